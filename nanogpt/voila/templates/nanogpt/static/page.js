// What voila.js expects to find: it calls voila_finish when the theme is there and the last cell has been sent.
window.voila_finish = () => {
  if (!window.themeLoaded) { window.cellLoaded = true; return; }
  document.getElementById("loading")?.remove();
  document.getElementById("rendered_cells").hidden = false;
};
window.display_cells = window.voila_finish;
window.voila_process = window.voila_heartbeat = window.update_loading_text = () => {};
// A page that is left for good gives its kernel back at once; without this it would be kept until it has been idle long enough.
window.addEventListener("pagehide", (event) => {
  const config = JSON.parse(document.getElementById("jupyter-config-data")?.textContent || "{}");
  if (!event.persisted && config.kernelId) navigator.sendBeacon(`${config.baseUrl}voila/api/shutdown/${config.kernelId}`);
});
