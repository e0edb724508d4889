"""Comments of parameters into docstrings, when notebooks are exported, so that `help(f)` and `f?` show them

`export_procs` in pyproject.toml names the processor. Nothing imports this module but `nbdev-export`."""
import ast, json, re
from functools import cache
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

nbs = Path(__file__).resolve().parents[1]/'nbs'

def _comments(src):
    "Line -> comment"
    return {t.start[0]: t.string.lstrip('# ') for t in generate_tokens(StringIO(src).readline) if t.type==COMMENT}

def _described(at, notes):
    "Name -> its comment, from name -> line: beside it, or in the lines above"
    there,res = {},{}
    for nm,line in at.items(): there.setdefault(line, []).append(nm)
    for line,nms in there.items():
        above = line-1
        while above in notes and above not in there: above -= 1
        found = notes.get(line) or ' '.join(notes[i] for i in range(above+1, line))
        if 'return' in nms: nms = ['return']
        nms = [nm for nm in nms if nm.strip('*') not in ('self', 'cls')]
        if found and nms: res[', '.join(nms)] = found
    return res

def _decorator(o, name):
    "The call or name of a decorator"
    return next((d for d in o.decorator_list if getattr(getattr(d, 'func', d), 'id', '')==name), None)

@cache
def _exported():
    "Sources of all cells that are exported"
    cells = [c for fn in sorted(nbs.rglob('*.ipynb')) for c in json.loads(fn.read_text(encoding='utf-8'))['cells']]
    return [src for c in cells if c['cell_type']=='code' and '#| export' in (src := ''.join(c['source']))]

def _definition(name):
    "(node, comments) of a class or function of the library, by its name; `None` if it is defined elsewhere"
    src = name and next((s for s in _exported() if re.search(rf'^(class|def) {name}\b', s, re.M)), None)
    return next((o, _comments(src)) for o in ast.parse(src).body if getattr(o, 'name', '')==name) if src else None

def _fields(o):
    "Name -> line of the fields of a dataclass or a named tuple"
    if not _decorator(o, 'dataclass') and 'NamedTuple' not in [getattr(b, 'id', '') for b in o.bases]: return {}
    return {a.target.id: a.lineno for a in o.body if isinstance(a, ast.AnnAssign)}

def params(
    o, # Node of a function or class
    notes, # Line -> comment of its source
)->dict: # Name -> comment; 'return' for the result
    "Collect what is said of each parameter, of those that are passed on, too"
    if isinstance(o, ast.ClassDef):
        init = next((f for f in o.body if getattr(f, 'name', '')=='__init__'), None)
        base = None if init or not o.bases else _definition(getattr(o.bases[0], 'id', ''))
        res = _described(_fields(o), notes) or (params(init, notes) if init else params(*base) if base else {})
    else:
        a = o.args
        at = {p.arg: p.lineno for p in [*a.posonlyargs, *a.args]}
        if a.vararg: at[f'*{a.vararg.arg}'] = a.vararg.lineno
        at |= {p.arg: p.lineno for p in a.kwonlyargs}
        if a.kwarg: at[f'**{a.kwarg.arg}'] = a.kwarg.lineno
        if o.returns: at['return'] = o.returns.lineno
        res = _described(at, notes)
    if not (to := _decorator(o, 'delegates')) or not (found := _definition(to.args[0].id)): return res
    but = next((ast.literal_eval(k.value) for k in to.keywords if k.arg=='but'), ())
    but = {'return', *res, *([but] if isinstance(but, str) else but)}
    more = {k: v for k,v in params(*found).items() if k not in but}
    return {**{k: v for k,v in res.items() if not k.startswith('**')}, **more}

def _literal(doc, docs, indent):
    "A docstring with what is said of parameters"
    lines = [f'    {k}: {v}' for k,v in docs.items() if k!='return']
    if lines: lines.insert(0, 'Args:')
    if 'return' in docs: lines += ['Returns:', f"    {docs['return']}"]
    text = '\n'.join([doc.rstrip(), '', *(' '*indent+l for l in lines)])
    return '"""' + text.replace('\\', '\\\\').replace('"""', r'\"\"\"') + ('\n' + ' '*indent if text.endswith('"') else '') + '"""'

def documented(
    src:str, # Python
)->str: # The same, with longer docstrings
    "Write the comments of parameters into the docstrings of public functions, classes and methods"
    notes,lines = _comments(src),src.splitlines(keepends=True)
    todo,new = [*ast.parse(src).body],[]
    while todo:
        o = todo.pop()
        if isinstance(o, ast.ClassDef): todo += o.body
        elif not isinstance(o, ast.FunctionDef) or o.name.startswith('_'): continue
        doc = ast.get_docstring(o, clean=False)
        if doc and (docs := params(o, notes)): new.append((o.body[0].value, _literal(doc, docs, o.col_offset+4)))
    for d,text in sorted(new, key=lambda x: -x[0].lineno):
        first,last = lines[d.lineno-1].encode()[:d.col_offset].decode(), lines[d.end_lineno-1].encode()[d.end_col_offset:].decode()
        lines[d.lineno-1:d.end_lineno] = [first+text+last]
    return ''.join(lines)

def export_docments(
    cell, # Of a notebook that is exported
):
    "Processor for `nbdev-export`: document the parameters in the docstrings of an exported cell"
    if cell.cell_type=='code' and {'export', 'exporti', 'exports'} & set(cell.directives_): cell.set_source(documented(cell.source))
