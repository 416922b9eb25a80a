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

const keep = (where, name, value) => { try { window[where].setItem(name, value) } catch { /* a private window may refuse */ } }
const kept = (where, name) => { try { return window[where].getItem(name) ?? "" } catch { return "" } }
const setTheme = theme => { document.documentElement.dataset.theme = theme; keep("localStorage", "ng-theme", theme) }
const dark = () => getComputedStyle(document.documentElement).getPropertyValue("color-scheme").includes("dark") ||
  (document.documentElement.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches)

function render({model, el}) {
  const off = new AbortController(), on = (where, what, f) => where.addEventListener(what, f, {signal: off.signal})
  const say = (act, arg = "", value = "") => model.send({act, arg, value})
  const app = () => el.closest(".ng-app") ?? document.body
  const part = key => [...el.children].find(o => o.dataset.part === key)
  const grow = box => { box.style.height = "auto"; box.style.height = Math.min(box.scrollHeight, innerHeight * .4) + "px" }
  const alone = () => "voila" in document.body.dataset                   // a page of its own, not a cell in JupyterLab
  const small = matchMedia("(max-width: 900px)"), narrow = () => small.matches
  let follow = true                                                      // stay at the end while the answer grows

  el.classList.add("ng-board", ...model.get("css").split(" "))
  for (const [name, value] of Object.entries(model.get("about"))) el.setAttribute(name, value)

  // Nothing typed is lost: Python's words take their time, and whoever types does not wait for them.
  const typing = () => document.activeElement?.matches("input, textarea, select")
  const named = o => [o.closest("[data-arg]")?.dataset.arg, o.closest("[data-do]")?.dataset.do, o.name, o.tagName].join(" ")
  const mine = "input, textarea, details"                                // what a person changes in a part without our hearing of it
  const put = (key, html) => {
    const at = part(key) ?? el.appendChild(Object.assign(document.createElement("div"), {className: "ng-part"}))
    const old = new Map([...at.querySelectorAll(mine)].map(o => [named(o), o])), here = document.activeElement
    const back = at.contains(here) && named(here), [from, to] = back ? [here.selectionStart, here.selectionEnd] : []
    at.dataset.part = key; at.innerHTML = html
    for (const o of at.querySelectorAll(mine)) {
      const was = old.get(named(o))
      if (was?.open) o.open = true
      if (was && was.value !== was.defaultValue) { o.value = was.value; if (o.matches("textarea")) grow(o) }
      if (!was && o.autofocus && !typing()) o.focus()
    }
    const next = [...at.querySelectorAll("*")].find(o => back && named(o) === back)
    next?.focus(); if (from != null) next?.setSelectionRange?.(from, to)
    if (alone() && !narrow() && document.activeElement === document.body) at.querySelector("textarea")?.focus() // a phone would open its keyboard
  }
  const box = () => el.querySelector("textarea")                         // of the composer
  let lent = "", draft = null                                            // a text that was put there; during an edit: what stood there before
  const look = () => typing() || box().focus()
  const own = () => box().value === lent ? "" : box().value              // what a person has typed there
  const write = (...some) => { box().value = some.filter(Boolean).join("\n"); grow(box()) }
  const lend = text => { const typed = own(); write(text, typed); lent = typed ? "" : text; look() }
  const over = (...left) => { if (draft !== null) write(...left, draft); lent = ""; draft = null } // an edit, and what stays of its text
  const tasks = {
    all: o => {
      const names = o.parts.map(([key]) => key)
      follow = true
      for (const at of [...el.children]) if (!names.includes(at.dataset.part)) at.remove()
      o.parts.forEach(([key, html]) => put(key, html))
    },
    put: o => put(o.part, o.html),
    add: o => {
      const at = part(o.part); if (!at) return
      at.querySelector(`[data-grow="${o.k}"]`)?.insertAdjacentHTML("beforeend", o.html)
      const meter = at.querySelector(`[data-meter="${o.k}"]`); if (meter) meter.textContent = o.meter
    },
    at: o => keep("sessionStorage", "ng-conversation", o.conversation), // this tab's own, until it is closed
    mark: o => app().classList.toggle(o.name, o.on),
    fill: o => lend(o.text),
    edit: o => { app().classList.add("ng-editing"); draft = [own(), draft].filter(Boolean).join("\n"); write(lent = o.text); look() },
    edited: () => { app().classList.remove("ng-editing"); over(own()) },
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
    const b = e.target.closest("[data-do], [data-flip], [data-fill]")
    if (!b || b.matches("form, input, select")) return
    if (b.dataset.flip) return flip[b.dataset.flip]()
    if (b.dataset.fill) return app().dispatchEvent(new CustomEvent("ng-fill", {detail: b.dataset.fill}))
    if (b.dataset.do === "keep") over()
    say(b.dataset.do, b.dataset.arg)
    if (b.dataset.type) app().querySelector(".ng-input")?.focus()        // at once: later one may be typing elsewhere
    b.closest("details")?.removeAttribute("open")                        // a menu is done with
    if (b.dataset.close && narrow()) app().classList.remove("ng-show-left", "ng-show-right")
  })
  on(el, "change", e => {
    if (!e.target.matches("select[data-do]")) return
    if (e.target.dataset.do === "language") keep("localStorage", "ng-language", e.target.value)
    say(e.target.dataset.do, e.target.dataset.arg, e.target.value)
  })
  on(el, "submit", e => {
    e.preventDefault()
    const fields = Object.fromEntries(new FormData(e.target)), typed = e.target.querySelector("textarea")
    if (typed && !typed.value.trim()) return
    say(e.target.dataset.do, e.target.dataset.arg, fields)
    if (typed) { write(lent = ""); typed.focus() }
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
    if (e.key !== "Escape" || e.isComposing || !alone() && !app().contains(e.target)) return
    const at = app().classList
    if (at.contains("ng-editing") && !at.contains("ng-busy")) { over(); say("keep") }
    else say("stop")                                                     // what was sent this very moment is stopped too
    if (!at.contains("ng-busy") && !at.contains("ng-editing")) at.remove("ng-show-right", ...(narrow() ? ["ng-show-left"] : []))
    el.querySelector("textarea")?.focus()
  })
  const arrive = () => {                                                 // once the root is in the page
    if (!el.closest(".ng-app")) return off.signal.aborted || requestAnimationFrame(arrive)
    app().classList.toggle("ng-page", alone()); document.body.classList.toggle("ng-body", alone())
    const fold = () => { app().classList.toggle("ng-show-left", !narrow()); if (narrow()) app().classList.remove("ng-show-right") }
    fold(); on(small, "change", fold)                                    // a drawer beside the chat is in order, one over it nobody has opened
    on(app(), "ng-fill", e => lend(e.detail))
    on(app(), "click", e => { if (e.target === app()) app().classList.remove("ng-show-left", "ng-show-right") })
    if (alone() && !narrow()) el.querySelector("textarea")?.focus()
  }
  if (model.get("css").includes("ng-composer")) {
    arrive()
    model.on("comm_live_update", () => el.querySelector(".ng-lost")?.removeAttribute("hidden")) // its Python is gone
  }
  document.documentElement.dataset.theme ??= kept("localStorage", "ng-theme") || "auto"
  say("ready", model.get("css").split(" ")[0], {languages: navigator.languages.join(","), language: kept("localStorage", "ng-language"),
                                                conversation: kept("sessionStorage", "ng-conversation")})
  return () => { off.abort(); sizes.disconnect(); model.off("msg:custom", listen) }
}
export default {render}
