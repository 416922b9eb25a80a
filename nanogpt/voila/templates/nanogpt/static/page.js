// What voila.js expects to find: it calls voila_finish when the theme is there and the last cell has been sent.
window.voila_finish = () => {
  if (!window.themeLoaded) { window.cellLoaded = true; return; }
  document.getElementById("loading")?.remove();
  document.getElementById("rendered_cells").hidden = false;
};
window.display_cells = window.voila_finish;
window.voila_process = window.voila_heartbeat = window.update_loading_text = () => {};
