// A board is HTML that Python writes and a person presses. Python says what stands where, the board says what was pressed.
// Nothing is decided here: only what needs a browser (clicks inside HTML, keys, scrolling, the clipboard, a download).
const near = 80                                                          // px from the end that count as "at the end"

const copyText = async text => {
  try { await navigator.clipboard.writeText(text); return true } catch { /* a page without https has no clipboard */ }
  const box = Object.assign(document.createElement("textarea"), {value: text})
  document.body.append(box); box.select()
  const done = document.execCommand("copy")
  box.remove(); return done
}

const saveText = (name, text, mime) => {
  const url = URL.createObjectURL(new Blob([text], {type: mime}))
  Object.assign(document.createElement("a"), {href: url, download: name}).click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

const setTheme = theme => {
  document.documentElement.dataset.theme = theme
  try { localStorage.setItem("ng-theme", theme) } catch { /* a private window may refuse */ }
}
const dark = () => getComputedStyle(document.documentElement).getPropertyValue("color-scheme").includes("dark") ||
  (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches)

function render({model, el}) {
  const off = new AbortController(), on = (where, what, f) => where.addEventListener(what, f, {signal: off.signal})
  const say = (act, arg = "", value = "") => model.send({act, arg, value})
  const app = () => el.closest(".ng-app") ?? document.body
  const part = key => [...el.children].find(o => o.dataset.part === key)
  const grow = box => { box.style.height = "auto"; box.style.height = Math.min(box.scrollHeight, innerHeight * .4) + "px" }
  const alone = () => "voila" in document.body.dataset                   // a page of its own, not a cell in JupyterLab
  const narrow = () => matchMedia("(max-width: 900px)").matches
  let follow = true                                                      // stay at the end while the answer grows

  el.classList.add("ng-board", ...model.get("css").split(" "))
  for (const [name, value] of Object.entries(model.get("about"))) el.setAttribute(name, value)
  const put = (key, html) => {
    const at = part(key) ?? el.appendChild(Object.assign(document.createElement("div"), {className: "ng-part"}))
    const box = at.querySelector("textarea"), typed = box?.value, here = box && document.activeElement === box
    at.dataset.part = key; at.innerHTML = html
    const next = at.querySelector("textarea")
    if (next && typed) { next.value = typed; grow(next) }
    if (next && (here || alone() && !narrow() && document.activeElement === document.body)) next.focus() // a phone would open its keyboard
    at.querySelector("[autofocus]")?.focus()
  }
  const tasks = {
    all: o => { el.replaceChildren(); follow = true; o.parts.forEach(([key, html]) => put(key, html)) },
    put: o => put(o.part, o.html),
    add: o => {
      const at = part(o.part); if (!at) return
      at.querySelector(`[data-grow="${o.k}"]`)?.insertAdjacentHTML("beforeend", o.html)
      const meter = at.querySelector(`[data-meter="${o.k}"]`); if (meter) meter.textContent = o.meter
    },
    mark: o => app().classList.toggle(o.name, o.on),
    fill: o => { const box = el.querySelector("textarea"); box.value = o.text; grow(box); box.focus() },
    focus: o => el.querySelector(o.at)?.focus(),
    save: o => saveText(o.name, o.text, o.mime),
    copy: async o => {
      const done = await copyText(o.text), button = el.querySelector(`.ng-copy[data-arg="${o.arg}"]`)
      if (!done || !button) return
      button.classList.add("ng-done"); button.querySelector("span:last-child").textContent = o.done
      setTimeout(() => { button.classList.remove("ng-done"); button.querySelector("span:last-child").textContent = o.label }, 1500)
    },
    page: o => {                                                         // what the whole page needs to know
      if (!el.closest(".ng-app")) return off.signal.aborted || requestAnimationFrame(() => tasks.page(o))
      document.documentElement.lang = o.lang; document.title = o.title
      for (const knob of app().querySelectorAll(".ng-knob")) {
        const name = knob.querySelector(".ng-knob-name")?.textContent
        knob.querySelectorAll(".noUi-handle, input, textarea").forEach(x => x.setAttribute("aria-label", name))
      }
      for (const [at, name] of Object.entries(o.names)) app().querySelectorAll(at).forEach(x => x.setAttribute("aria-label", name))
    },
  }
  const settle = () => { if (follow) el.scrollTop = el.querySelector(".ng-turn") ? el.scrollHeight : 0 }
  const log = model.get("css").includes("ng-log")
  const listen = o => {
    if (o.op === "all") follow = true
    tasks[o.op]?.(o)
    if (log) settle()
  }
  model.on("msg:custom", listen)
  const sizes = new ResizeObserver(settle)                               // a drawer opens, a phone is turned
  if (log) { sizes.observe(el); on(el, "scroll", () => { follow = el.scrollHeight - el.scrollTop - el.clientHeight < near }) }

  const flip = {                                                         // presses that never leave the browser
    left: () => { app().classList.toggle("ng-show-left"); if (narrow()) app().classList.remove("ng-show-right") },
    right: () => { app().classList.toggle("ng-show-right"); if (narrow()) app().classList.remove("ng-show-left") },
    theme: () => setTheme(dark() ? "light" : "dark"),
  }
  on(el, "click", e => {
    const b = e.target.closest("[data-do], [data-flip]")
    if (!b || b.matches("form, input, select")) return
    if (b.dataset.flip) return flip[b.dataset.flip]()
    say(b.dataset.do, b.dataset.arg)
    b.closest("details")?.removeAttribute("open")                        // a menu is done with
    if (b.dataset.close && narrow()) app().classList.remove("ng-show-left", "ng-show-right")
  })
  on(el, "change", e => { if (e.target.matches("select[data-do]")) say(e.target.dataset.do, e.target.dataset.arg, e.target.value) })
  on(el, "submit", e => {
    e.preventDefault()
    const fields = Object.fromEntries(new FormData(e.target)), box = e.target.querySelector("textarea")
    if (box && !box.value.trim()) return
    say(e.target.dataset.do, e.target.dataset.arg, fields)
    if (box) { box.value = ""; grow(box); box.focus() }
  })
  on(el, "input", e => { if (e.target.matches("textarea")) grow(e.target) })
  on(el, "keydown", e => {
    const plain = e.key === "Enter" && !e.shiftKey && !e.isComposing     // while a Chinese word is being composed, Enter picks it
    if (plain && e.target.matches("textarea")) { e.preventDefault(); e.target.form.requestSubmit() }
    if ([" ", "Enter"].includes(e.key) && e.target.matches("[data-do]:not(button, form, select, input)")) {
      e.preventDefault(); say(e.target.dataset.do, e.target.dataset.arg)
    }
  })
  if (model.get("css").includes("ng-composer")) on(document, "keydown", e => {
    if (e.key !== "Escape" || e.isComposing) return
    if (app().classList.contains("ng-busy")) say("stop")
    else if (app().classList.contains("ng-editing")) say("keep")
    else app().classList.remove("ng-show-right", ...(narrow() ? ["ng-show-left"] : []))
    el.querySelector("textarea")?.focus()
  })
  const arrive = () => {                                                 // once the root is in the page
    if (!el.closest(".ng-app")) return off.signal.aborted || requestAnimationFrame(arrive)
    app().classList.toggle("ng-page", alone()); document.body.classList.toggle("ng-body", alone())
    if (!narrow()) app().classList.add("ng-show-left")
    on(app(), "click", e => { if (e.target === app()) app().classList.remove("ng-show-left", "ng-show-right") })
    if (alone() && !narrow()) el.querySelector("textarea")?.focus()
  }
  if (model.get("css").includes("ng-composer")) arrive()
  let kept = null
  try { kept = localStorage.getItem("ng-theme") } catch { /* as above */ }
  document.documentElement.dataset.theme ??= kept ?? "auto"
  say("ready", model.get("css").split(" ")[0], {languages: navigator.languages.join(",")})
  return () => { off.abort(); sizes.disconnect(); model.off("msg:custom", listen) }
}
export default {render}
