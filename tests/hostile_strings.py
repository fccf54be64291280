"""Texts that mean something to whoever shows them: a browser, a terminal, a spreadsheet, a parser.

One or more of each kind that a study could carry in its names, values, reasons and files.
"""

from collections.abc import Sequence

PAGE = (  # a browser would run or load them
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "</ScRiPt ><img src=x onerror=alert(3)>",
    "<!--<script>",
    "--><img src=x onerror=alert(4)>",
    "]]><svg onload=alert(5)>",
    '"><svg onload=alert(6)>',
    "'><img src=x onerror=alert(7)>",
    '" onmouseover="alert(8)" x="',
    "' autofocus onfocus='alert(9)",
    "` onmouseover=`alert(10)",
    "<img src=http://hostile.example/pixel.png>",
    "<iframe srcdoc='<script>alert(11)</script>'></iframe>",
    "<object data='data:text/html,<script>alert(12)</script>'></object>",
    "<embed src=javascript:alert(13)>",
    "<a href='javascript:alert(14)'>follow</a>",
    '<a href="data:text/html;base64,PHNjcmlwdD5hbGVydCgxNSk8L3NjcmlwdD4=">x</a>',
    "<form action=http://hostile.example/><button>send</button></form>",
    "<meta http-equiv=refresh content='0;url=http://hostile.example/'>",
    "<base href=http://hostile.example/>",
    "<link rel=stylesheet href=http://hostile.example/x.css>",
    "<style>@import 'http://hostile.example/x.css';</style>",
    "</style><style>*{display:none}</style>",
    "<div style='background:url(http://hostile.example/x.png)'>",
    "x:expression(alert(16))",
    "</title><script>alert(17)</script>",
    "</textarea></pre></code><h1>out</h1>",
    "<math><mtext><script>alert(18)</script></mtext></math>",
    "<svg><animate onbegin=alert(19) attributeName=x></svg>",
    "<details open ontoggle=alert(20)><summary>x</summary></details>",
    "<video><source onerror=alert(21)></video>",
    "<body onload=alert(22)>",
    "<template><b>inert?</b></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(23)>'>",
    "&lt;script&gt;alert(24)&lt;/script&gt;",
    "&#60;img src=x onerror=alert(25)&#62;",
    "&amp;&nbsp;&copy;&bogus;",
    "\\u003cscript\\u003ealert(26)\\u003c/script\\u003e",
    "';alert(27)//",
    "\\';alert(28)//",
    "${alert(29)}`;alert(30)//`",
    "*/alert(31)/*",
    "first\u2028second\u2029third",
    "javascript:alert(32)",
    "data:text/html,<script>alert(33)</script>",
    "<plaintext>",
    "<x onclick=alert(34)>",
    "<",
    "\uff1cscript\uff1ealert(35)\uff1c/script\uff1e",
)
FIGURES = (  # plotly, or a formula renderer, would give them form
    "<b>bold</b><br>next<sup>2</sup>",
    "<a href='http://hostile.example/'>plotly link</a>",
    "<span style='font-size:90px'>large</span>",
    "<extra></extra>",
    "$\\sum_{i=1}^{n} x_i$",
    "$$\\href{javascript:alert(36)}{x}$$",
    "\\(\\frac{1}{0}\\)",
    "%{x} %{customdata[0]} %{fullData.name}",
    "@stable",
    "@0:scale",
)
TEMPLATES = (  # formatting would fill them in
    "{{ 7 * 7 }}",
    "{% raw %}{% for x in y %}",
    "{# comment",
    "{0} {name} {run} {trial!r} {attempt:>9999}",
    "%s %d %(name)s %n",
    "$HOME ${IFS} $(touch hostile) `touch hostile`",
    "'; touch hostile; '",
    "$& $1 $` $'",
)
TERMINAL = (  # a terminal would act on them
    "[/red] [bold]bold[/] [link=http://hostile.example/]x[/link]",
    "\x1b[31mred\x1b[0m",
    "\x1b[2J\x1b[H",
    "\x1b]0;title\x07",
    "\x1b]8;;http://hostile.example/\x1b\\click\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1bP+q544e\x1b\\",
    "\x1b[6n\x1bc",
    "\x9b31m c1 \x9d0;t\x9c",
    "abc\b\b\bxyz",
    "good\rover",
    "bell\x07 form\x0c vertical\x0b",
    "two\nlines\r\nthree",
    "tab\tbed",
    "\x7f\x00nul\x00",
)
UNSEEN = (  # letters that cannot be seen or stand elsewhere than they seem to
    "invoice\u202egnp.exe",
    "\u2066isolated\u2069 \u2067other\u2069",
    "\u061carabic mark",
    "zero\u200bwidth\u200cjoin\u200ders\ufeff",
    "soft\u00adhyphen",
    "\U000e0041\U000e0042 tags",
    "\ufff9ruby\ufffanote\ufffb",
    "filler\u3164\u115f\uffa0 blank\u2800 variant\ufe0f\U000e0100",
    "\ud800 lone",
    "\udfff\ud800 swapped",
    "Z\u0351\u036b\u0343\u036aa\u0342\u034c",
    "\u0440\u0430\u0443\u0440\u0430l",  # Cyrillic letters
    "a\uff0fb\u2215c\u2044d",  # not slashes
    "a\u00a0b\u3000c",
)
CELLS = (  # a spreadsheet would compute them
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(1,1)",
    "\t=1+1",
    '\r=HYPERLINK("http://hostile.example/","x")',
    " =2+2",
    "|calc",
    "\uff1d1+1",
    'quote",=1+1,"',
)
FILES = (  # a path, a parser or a program would read more than text into them
    "../../../etc/passwd",
    "..\\..\\windows",
    "/dev/null",
    "name: {a: &x [*x]}",
    "!!python/object/apply:os.system [id]",
    "# comment: no",
    "- item",
    "null",
    "yes",
    "1024",
    "1e999",
    "NaN",
    "-0.0",
    "0x10",
    "2026-01-01",
    "__proto__",
    "constructor",
    "hasOwnProperty",
    "toString",
    "--help",
)
MARKDOWN = (  # a renderer would give them form
    "[x](http://hostile.example/)",
    "![x](http://hostile.example/x.png)",
    "[x]: http://hostile.example/",
    "<http://hostile.example/>",
    "http://hostile.example/ www.hostile.example",
    "# heading",
    "~~~\n```\nout of the fence",
    "`code` ``more``",
    "|a|b|\n|---|---|",
    "*bold* __more__ ~~gone~~",
    "@someone #1 !1",
    "setext\n===",
    "1. one",
    "\\<b\\> \\[x\\](y)",
)
STRANGE = (
    "",
    "long " * 400,
    "w" * 2000,
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
)
HOSTILE_STRINGS: tuple[str, ...] = (
    *PAGE, *FIGURES, *TEMPLATES, *TERMINAL, *UNSEEN, *CELLS, *FILES, *MARKDOWN, *STRANGE,
)  # fmt: skip


def tame_strings() -> tuple[str, ...]:
    """Return as many texts that mean nothing to anybody; the empty one stays."""
    return tuple(text and f"tame{i}" for i, text in enumerate(HOSTILE_STRINGS))


def share(strings: Sequence[str], part: int, parts: int) -> tuple[str, ...]:
    """Return every `parts`-th of some texts, so that the parts together are all of them."""
    return tuple(strings[part::parts])
