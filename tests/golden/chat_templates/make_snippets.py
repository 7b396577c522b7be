"""Renders short templates with transformers' own environment; run beside this file: python make_snippets.py"""
import json, pathlib
from transformers.utils import chat_template_utils as utils

here = pathlib.Path(__file__).parent
given = json.loads(r'''{
 "t": true, "f": false, "n": null, "i": 7, "neg": -7, "zero": 0, "x": 2.5, "whole": 2.0, "big": 123456789012345678901234567890123456789012,
 "mid": 18446744073709551616, "small": 1e-7, "large": 1e16, "almost": 9999999999999998.0, "minus": -0.0, "long": 0.30000000000000004,
 "exp": 1E22, "exp23": 1.5e+23, "tiny": 5e-324, "max": 1.7976931348623157e308, "cut": 0.1, "third": 0.3333333333333333, "inf": Infinity, "ninf": -Infinity, "nan": NaN, "mzero": -0,
 "thousandth": 0.0001, "below": 0.00001, "e15": 1e15, "odd": 123456789.125, "i64": -9223372036854775808,
 "s": "plain", "empty": "", "blank": "  a b\t", "q": "it's", "qq": "say \"hi\"", "both": "it's \"hi\"", "lines": "a\nb\r\nc\n", "uni": "Zürich – 🦀 \u00a0x\u200b", "esc": "\\ \u0007\u001b\u007f\u0085</x>&'\"", "num": "42", "word": "hello wide world",
 "l": [1, true, null, "a'b", 2.5, [], {}], "e": [], "nums": [3, 1, 2], "names": ["b", "a", "C"], "nest": [[1, 2], [3]],
 "d": {"k": "v", "b": null, "a": [1, {"z": 1e-7}], "items": 3, "ü": "é"}, "de": {}, "rows": [{"n": "x", "v": 1, "on": true}, {"n": "y", "v": 2, "on": false}, {"n": "z", "v": 3, "deep": {"w": 5}}]
}''')

names = list(given)
out = []
# Every value as text, in a text, in a list, as JSON, and under every test.
for name in names:
    out += ["{{ %s }}" % name, "{{ %s | string }}" % name, "{{ 'x' ~ %s }}" % name, "{{ [%s] }}" % name, "{{ %s | tojson }}" % name, "{{ {'k': %s} | tojson }}" % name,
            "{{ {'k': %s} }}" % name, "{{ [%s, %s] | join('-') }}" % (name, name), "{{ %s | length }}" % name, "{{ %s | list }}" % name, "{{ 'yes' if %s else 'no' }}" % name,
            "{%% set y %%}{{ %s }}{%% endset %%}{{ y }}" % name, "{%% for z in %s %%}<{{ z }}>{%% endfor %%}" % name, "{{ %s == %s }}" % (name, name), "{{ %s + 1 }}" % name, "{{ %s is defined and %s is not none }}" % (name, name)]
tests = ["iterable", "sequence", "mapping", "string", "number", "integer", "float", "boolean", "none", "defined", "undefined", "true", "false", "callable", "lower", "upper", "odd", "even"]
for name in ["t", "n", "i", "big", "mid", "small", "x", "whole", "inf", "s", "empty", "l", "e", "d", "de", "nothing", "rows", "lines", "zero", "f"]:
    out += ["{{ %s is %s }}" % (name, test) for test in tests]
out += ["{{ %s }}" % text for text in r'''
tools is iterable and tools | length > 0
nothing is iterable and nothing | length > 0
nothing | length
nothing | default('d')
n | default('d')
n | default('d', true)
empty | default('d', boolean=true)
nothing.attr
nothing.attr.more
d.nothing
d.nothing.more
d['k']
d.k
d.items()
d.items
d['items']
d.keys()
d.values()
d.keys() | list
d.values() | list
d.items() | list
d.get('k')
d.get('q')
d.get('q', 'r')
d | items
d | items | list
d | dictsort
d | length
d | list
d | first
'k' in d
'q' in d
'q' not in d
'lai' in s
1 in l
4 in l
none in l
'a' in nothing
l[0]
l[-1]
l[9]
l[1:3]
l[::-1]
l[:2] + l[2:]
nums[::-1]
nums[2:0:-1]
nums[-2:]
nums[:-1]
nums[::2]
s[0]
s[-1]
s[1:3]
s[::-1]
s[-3:]
s[10:]
s[9]
s[::-2]
uni[2:]
uni | length
nest | sum(start=[])
nums | sum
nums | max
nums | min
nums | sort
names | sort
names | sort(case_sensitive=true)
names | sort(reverse=true)
nums | reverse | list
s | reverse
nums | first
nums | last
e | first
e | last
nums | join
nums | join(', ')
rows | map(attribute='n') | list
rows | map(attribute='n') | join(',')
rows | map(attribute='deep.w') | list
rows | map(attribute='deep.w', default=0) | list
rows | selectattr('on') | map(attribute='n') | list
rows | selectattr('v', 'equalto', 2) | list
rows | selectattr('v', '==', 2) | list | length
rows | selectattr('v', 'gt', 1) | map(attribute='n') | join
rows | selectattr('deep', 'defined') | list | length
rows | selectattr('n', 'in', ['x', 'z']) | map(attribute='n') | list
rows | rejectattr('on') | map(attribute='n') | list
rows | rejectattr('v', 'equalto', 2) | map(attribute='n') | list
nums | select('odd') | list
nums | reject('odd') | list
nums | select('>', 1) | list
nums | map('string') | list
names | map('upper') | list
names | map('upper') | join
rows | groupby('v')
rows | sum(attribute='v')
rows | sort(attribute='v', reverse=true) | map(attribute='n') | list
rows | unique(attribute='on') | list | length
['a', 'A', 'b'] | unique | list
nums | batch(2) | list
nums | slice(2) | list
7 // 2
-7 // 2
7 // -2
7.5 // 2
7 % 3
-7 % 3
7 % -3
-7.5 % 2
7 / 2
6 / 2
2 ** 3
2 ** -1
2 ** 100
2 ** 0.5
7 / 0
7 // 0
7 % 0
1 + 2 * 3
1.5 + 1
0.1 + 0.2
1e3
1_000
2 * 'ab'
'ab' * 2
[1] * 3
'a' + 'b'
'a' + 1
[1] + [2]
(1, 2) + (3,)
(1, 2)
(1,)
()
'a' ~ 1 ~ none ~ true
true + true
true == 1
1 == 1.0
'1' == 1
none == false
none < 1
1 < 2 < 3
3 > 2 > 2
'a' < 'b'
[1, 2] < [1, 3]
not none
not ''
1 and 2
0 or 'x'
'' or none
none or ''
e or 'nothing'
i if t else x
i if f
(i if f) is undefined
-i
-i | abs
neg | abs
+i
x | int
'3' | int
'3.7' | int
'a' | int
'a' | int(5)
'0x1f' | int(0, 16)
'1.5' | float
'a' | float
x | round
2.567 | round(2)
2.5 | round
3.5 | round
x | round(0, 'floor')
whole | int
i | float
mid + 1
mid * 2
mid // 2
mid % 7
mid == 18446744073709551616
large + 1
large | int
s.upper()
s.title()
s.capitalize()
word.title()
"they're bill's" | title
word | capitalize
'HELLO' | capitalize
word.split()
word.split(' ')
word.split(' ', 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.rsplit(',', 1)
'a,,b'.split(',')
'  a  b '.split()
''.split()
''.split(',')
word.partition(' ')
word.rpartition(' ')
lines.splitlines()
lines.splitlines(true)
blank.strip()
blank.lstrip()
blank.rstrip()
blank | trim
'xxaxx' | trim('x')
'xxaxx'.strip('x')
'xxaxx'.lstrip('x')
'xxaxx'.rstrip('x')
'\n a \n'.strip('\n')
uni.strip()
s.startswith('pl')
s.startswith(('a', 'pl'))
s.endswith('in')
s.startswith('l', 1)
s.replace('l', 'L')
word.replace('l', 'L', 1)
word | replace('l', 'L')
word | replace('l', 'L', 2)
s.find('a')
s.find('z')
s.rfind('p')
s.index('a')
s.index('z')
word.count('l')
nums.count(3)
nums.index(2)
nums.index(9)
s.center(9)
s.center(9, '*')
s.ljust(7) ~ '|'
s.rjust(7)
num.zfill(5)
s.isalpha()
num.isdigit()
num.isnumeric()
num.isdecimal()
s.islower()
s.isupper()
' '.isspace()
'ab1'.isalnum()
'abc'.isidentifier()
'Ab'.swapcase()
'ß'.casefold()
'prefix-x'.removeprefix('prefix-')
'x.py'.removesuffix('.py')
','.join(names)
','.join(nums)
'-'.join('abc')
'a\tb'.expandtabs(4)
'{}: {}'.format('a', 1)
'{0}{1}{0}'.format('a', 'b')
'{x:>5}|{y:<5}|'.format(x='a', y=1)
'{:.2f}'.format(2.567)
'{:05d}'.format(42)
'{:,}'.format(1234567)
'{!r}'.format('a')
'%s is %d' | format('x', 3)
'%.2f' | format(2.567)
'%5s|%-5s|' | format('a', 'b')
'%(a)s' | format(a=1)
'%s' % 'x'
'%s-%s' % ('x', 1)
'%d%%' % 5
s | upper
s | lower
s | wordcount
word | wordcount
word | truncate(8)
word | truncate(8, true, '..')
lines | indent
lines | indent(2, true)
'a\n\nb' | indent(2)
'a\n\nb' | indent(2, blank=true)
s | list
s | e
esc | escape
esc | forceescape
'<b>' | safe
'<b>x</b>' | striptags
esc | urlencode
l | tojson(indent=2)
d | tojson(indent=4)
d | tojson(indent=0)
d | tojson(indent='--')
e | tojson(indent=2)
de | tojson(indent=2)
d | tojson(sort_keys=true)
d | tojson(sort_keys=True, indent=1)
d | tojson(separators=(',', ':'))
d | tojson(separators=(', ', ' = '))
d | tojson(separators=[',', ':'], indent=2)
d | tojson(ensure_ascii=true)
uni | tojson(ensure_ascii=True)
uni | tojson
esc | tojson
esc | tojson(ensure_ascii=true)
d | tojson(true)
d | tojson(false, 2)
d | tojson(false, none, (',', ':'), true)
d | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)
d | tojson(wrong=1)
d | tojson(separators=',')
d | tojson(separators=1)
nothing | tojson
[nothing] | tojson
(1, 2) | tojson
{1: 'a', 'b': 2} | tojson
{true: 1, none: 2, 1.5: 3} | tojson
{'b': 1, 'a': 2} | tojson(sort_keys=true)
{'b': 1, 1: 2} | tojson(sort_keys=true)
{'a': {'d': 1, 'c': 2}} | tojson(sort_keys=true)
d.items() | list | tojson
rows | map(attribute='n') | list | tojson
rows | map(attribute='n') | tojson
range(3) | tojson
range(3)
range(3) | list
range(1, 10, 3) | list
range(5, 0, -2) | list
range(0) | length
dict(a=1, b='x')
dict(a=1) | tojson
dict([('a', 1)])
namespace(a=1).a
'a' is string and 'b' is string
i is divisibleby 7
i is divisibleby(2)
s is eq('plain')
s is ne 'x'
i is gt 3
i is in [7, 8]
i is sameas 7
t is sameas true
s is not string
"a" 'b'
'\u00e9\n\x41\\'
'a\'b'
"a'b" | string
["a'b", 'a"b', 'a\nb', '\x07', '\\', 'é', '\u200b', '🦀']
{'a': none, 'b': [true, 1.0], 'c': (1, 2)}
[['a']] | string
{'a': 1}.items() | list
'a' in 'abc' and not ('z' in 'abc')
s | attr('upper')
d | attr('k')
d | map('upper') | list
[1, 2, 3][1:] | first
rows[0].n ~ rows[-1]['n']
rows | length - 1
(rows | length) - 1
rows[(rows | length) - 1].n
lipsum is defined
strftime_now is defined
raise_exception('no')
raise_exception is defined
cycler('a', 'b').next()
joiner(',')()
nums | random in nums
1 if nothing else 2
nothing == nothing
nothing == none
nothing ~ 'x'
nothing + 'x'
nothing[0]
nothing()
none.x
none['x']
none | length
none ~ ''
i | length
s.nope
s.nope()
s.nope is defined
l.nope
l['0']
d[0]
d.k.upper()
i.real
'abc'|first
'abc'|last
none | list
none | join
i | string | length
x | string
1.0
100000000000000000000.0
1e100
1.0e-5
1e5
123456789012345678
0.1
true
True
None
none
[true, none]
none | string
'a' if none is none
s is mapping
'%s' | format(none)
'%r' | format('a')
'{}'.format(none)
'{}'.format(1e16)
'{}'.format(true)
-2 ** 2
2 ** 3 ** 2
1 - -1
8 - 4 - 2
1 ~ 2 + 3
1 + 2 ~ 3
not t == f
'a' 'b' ~ 'c'
i == 7 and x == 2.5 or f
nums | map('abs') | list
'a\nb' | replace('\n', '\\n')
[3, 1] | sort | join
'B' < 'a'
[none, 1] | select | list
['', 'a', none] | select | list
rows | selectattr('deep.w', 'defined') | map(attribute='n') | list
rows | map(attribute='v') | sum
'abc' | batch(2) | list
['x'] * 0
s * -1
'a' * 3 + 'b'
l | string | length
messages is defined
'a;b' | replace(';', none)
'5' | int + 1
5 | string + 'a'
i | tojson + 's'
('a' ~ 'b') | upper
'a' ~ 'b' | upper
x is number and x is not integer
[1, 2] is sequence and [1, 2] is iterable
'x' is sequence
{} is mapping and {} is not sequence
range(3) is iterable
range(3) is sequence
d.items() is iterable
(1, 2) is sequence
'a' is iterable
7 is float
7.0 is integer
true is number
true is integer
true is boolean
1 is boolean
1 is true
'None' is none
'''.strip("\n").split("\n") if text]
out += r'''
{% for m in rows %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }};{% endfor %}
{% for m in rows %}{{ loop.previtem.n if loop.previtem is defined }}<{{ m.n }}>{{ loop.nextitem.n if loop.nextitem is defined }}{% endfor %}
{% for m in rows %}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{% endfor %}
{% for m in rows %}{{ loop.changed(m.on) }}{% endfor %}
{% for m in rows if m.v > 1 %}{{ loop.index }}{{ m.n }}{% else %}none{% endfor %}
{% for m in e %}x{% else %}none{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in d | items %}{{ k }}={{ v }};{% endfor %}
{% for k in d %}{{ k }};{% endfor %}
{% for a, b in nest %}{{ a }}{{ b }}{% endfor %}
{% for a in nothing %}x{% endfor %}ok
{% for a in n %}x{% endfor %}ok
{% for a in i %}x{% endfor %}ok
{% for c in s %}{{ c }}.{% endfor %}
{% for m in rows %}{% if loop.first %}{% continue %}{% endif %}{{ m.n }}{% if m.v == 2 %}{% break %}{% endif %}{% endfor %}
{% for m in rows[::-1] %}{{ m.n }}{{ loop.last }}{% endfor %}
{% for m in rows | reverse %}{{ m.n }}{% endfor %}
{% for m in rows %}{% for q in rows %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}
{% for m in nest recursive %}[{{ loop(m) if m is iterable and m is not string else m }}]{% endfor %}
{% set y = 1 %}{% for m in rows %}{% set y = m.v %}{% endfor %}{{ y }}
{% set ns = namespace(y=1) %}{% for m in rows %}{% set ns.y = m.v %}{% endfor %}{{ ns.y }}
{% set ns = namespace(y=1) %}{{ ns.z is defined }}{% set ns.z = 2 %}{{ ns.z }}
{% set ns = namespace() %}{% set ns.a = [] %}{% set ns.a = ns.a + [1] %}{{ ns.a }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% set a = [1, 2] %}{{ a.append(3) }}{{ a }}
{% if e %}a{% elif nothing %}b{% elif zero %}c{% else %}d{% endif %}
{% if nothing is defined and nothing.x %}a{% else %}b{% endif %}
{% if not n %}a{% endif %}
{% macro m(a, b=2) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(a=4) }}
{% macro m(a) %}{{ a }}{{ caller() if caller }}{% endmacro %}{% call m(1) %}x{% endcall %}
{% macro m(a) %}[{{ a }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ m(1, 2, b=3) }}
{% macro outer(x) %}{% if x > 0 %}{{ x }}{{ outer(x - 1) }}{% endif %}{% endmacro %}{{ outer(3) }}
{%- macro m(a) -%}  {{ a }}  {%- endmacro -%}<{{ m(1) }}>
{{ m is defined }}{% macro m() %}{% endmacro %}
{% with a = 1 %}{{ a }}{% endwith %}{{ a is defined }}
{% filter upper %}abc{{ s }}{% endfilter %}
{% set y | upper %}abc{% endset %}{{ y }}
{% set y %}a{{ s }}{% endset %}{{ y }}{{ y is string }}{{ y | length }}
{% raw %}{{ x }}{% endraw %}
{# a comment #}a{#- b -#} c
a {%- if t %} b {%- endif %} c
a {%+ if t %} b {% endif +%} c
  {% if t %}  b  {% endif %}  c
{% if t %}\na\n{% endif %}\nb\n
a\n  {% if t %}\n  b\n  {% endif %}\nc
a\n\t{%- if t -%}\n b {{- s -}} c\n{% endif %}
{{ s }}\n{{ s }}\n
{{ s -}}\n{{- s }}
\n{{ s }}
x\n{# c #}\ny
x\n  {# c #}  \ny
x  {#- c #}\ny
{% set x = {'a': 1, 'b': [1, 2]} %}{{ x.a }}{{ x.b[1] }}{{ x }}
{% set x = 'a' if t else 'b' %}{{ x }}
{% set content = nothing | default('', true) | trim %}<{{ content }}>
{% set content = rows[0]['n'] | trim + '!' %}{{ content }}
{{ '<' + rows[0]['n'] + '>' + '\n' }}
{{ rows[0].n if rows[0].n is defined else 'q' }}{{ rows[0].z if rows[0].z is defined else 'q' }}
{% for m in rows %}{% if (m.n == 'x') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{{ m.n }}{% endfor %}
{% generation %}a{{ s }}{% endgeneration %}b
{% for m in rows %}{% generation %}{{ m.n }}{% endgeneration %}\n{% endfor %}
{%- generation -%}  a  {%- endgeneration -%}  b
{% generation %}\na\n{% endgeneration %}\nb
{% if t %}{%- generation %} a {%- endgeneration %}{% endif %} b
{% if nothing == none %}a{% else %}b{% endif %}
{% if n == none %}a{% endif %}{% if n is none %}b{% endif %}
{% if 'k' in d and d['k'] is not none %}a{% endif %}
{% if d.get('b') is none %}a{% endif %}
{% if rows[0].role == 'x' %}a{% else %}b{% endif %}
{% if rows[0]['role'] is defined %}a{% else %}b{% endif %}
{% set x = rows | selectattr('v', 'equalto', 3) | list %}{{ x[0].n }}{{ x | length }}
{% set last = rows | rejectattr('v', 'equalto', 3) | map(attribute='n') | list | last %}{{ last }}
{% set x = rows[1:] %}{{ x | length }}{{ x[0].n }}
{% set x = rows[1:] %}{% for m in x %}{{ m.n }}{{ loop.last }}{% endfor %}{{ x | tojson }}
{% set x = [] %}{% set x = x + ['a'] %}{% set x = x + ['b'] %}{{ x | join(',') }}{{ x }}
{% set x = {} %}{{ x.update({'a': 1}) }}
{% set d2 = dict(d, z=1) %}{{ d2.z }}{{ d2 | length }}
{% do 1 %}
{% include 'x' %}
{% nope %}
{{ x | nope }}
{{ x is nope }}
{{ nope(1) }}
{{ (
{% if %}
{% for i in range(3) %}{{ i }}{% endfor %}{{ i }}
{%- for i in range(0, rows | length) %}{{ rows[i].n }}{% endfor %}
{% for i in range(rows | length - 1, -1, -1) %}{{ i }}{% endfor %}
{% set ns = namespace(found=false, at=-1) %}{% for m in rows[::-1] %}{% set index = (rows | length - 1) - loop.index0 %}{% if not ns.found and m.v == 2 %}{% set ns.found = true %}{% set ns.at = index %}{% endif %}{% endfor %}{{ ns.at }}
{% set parts = word.split(' ') %}{{ parts[0] }}{{ parts[-1] }}{{ parts | length }}
{{ word.split('wide')[0].rstrip() ~ '|' ~ word.split('wide')[-1].lstrip() }}
{% if word.startswith('hello') and word.endswith('world') %}a{% endif %}
{% if '</think>' in word %}a{% else %}b{% endif %}
{{ "a" if s is string else s | tojson }}{{ d | tojson if d is not string else d }}
{{- '{"name": "' + s + '", "arguments": ' }}{{ d | tojson }}{{- '}' }}
{% for key in d | list %}{{ key }}{% if not loop.last %}, {% endif %}{% endfor %}
{% for key, value in d | dictsort %}{{ key }}{% endfor %}
{{ '\n\n' if rows | length > 1 else '' }}{{ '\n' }}
{{ rows | map(attribute='n') | join('\n') }}
{{ x | string ~ 'a' }}{{ whole | string }}{{ i ~ 'b' }}
{% set x = 5 %}{% set x = x + 1 %}{{ x }}
{{ loop is defined }}{{ self is defined }}
{% for m in rows %}{{ m.n }}{{ "," if not loop.last else "." }}{% endfor %}
{{ [s, num]|join(' ')|upper|replace('P', 'p') }}
{{ '%02d' % 5 }}{{ '%x' % 255 }}
{% set a = namespace(b={'c': 1}) %}{{ a.b.c }}{{ a.b['c'] }}
{{ (rows | first).n }}{{ (rows | last).n }}
{% if loop is not defined %}a{% endif %}
{% set i = 3 %}{% if i > 2 and i <= 3 and i != 4 %}a{% endif %}
{{ {'a': 1}['a'] }}{{ [1, 2, 3][-1] }}{{ (1, 2)[0] }}{{ 'abc'[1] }}
{% for x in [1, 2, 3] if x is odd %}{{ x }}{% endfor %}
{% for x in (1, 2) %}{{ x }}{% endfor %}
{% for x in 'a', 'b' %}{{ x }}{% endfor %}
{% for x in {'a': 1} %}{{ x }}{% endfor %}
{% call(x) m() %}{{ x }}{% endcall %}{% macro m() %}{{ caller(1) }}{% endmacro %}
{% macro m() %}{{ caller(1) }}{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}
{% macro m(x) %}{{ x }}{% set y = 2 %}{% endmacro %}{{ m(1) + m(2) }}{{ m(1) | upper }}{{ m(' a ') | trim }}
{{ "{{ x }}" }}{{ '%}' }}
{{ s|upper }}{{ s |upper}}{{s}}
{% set q = "a" %}{% set w = q ~ "\"" ~ '\'' %}{{ w }}
{{ '\\n' }}{{ "\t|" }}{{ '\d' }}
'''.strip("\n").split("\n")[:]
out = list(dict.fromkeys(text.replace("\\n", "\n") if text.startswith(("{% if t %}\\n", "a\\n", "{{ s }}\\n", "{{ s -}}", "\\n", "x\\n", "x  {", "{% generation %}\\n", "{% for m in rows %}{% gen")) else text for text in out))

cases = []
for template in out:
    try:
        compiled = utils._compile_jinja_template(template)
        text = compiled.render(**given)
    except Exception:
        text = None
    if text is not None and ("at 0x" in text or "<built-in" in text or "object" in text and "<" in text):
        continue  # an address of Python's memory
    if "random" in template or "lipsum" in template or "strftime" in template:
        continue
    cases.append([template, text])
(here / "snippets.json").write_text("{\"given\":\n" + json.dumps(given, ensure_ascii=False) + ",\n\"cases\": [\n"
    + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]}\n")
print(len(cases), "cases,", sum(text is None for _, text in cases), "refused")
