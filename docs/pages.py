"""The site's pages, made from the notebooks with their stored outputs: nothing is executed, and Quarto is not needed

An exported cell becomes its names' signatures and tables of parameters, read from the module, with the source folded away beneath. The menu is
`groups`, what a reader wants, and the API: rooms by their numbers, wings by their folders."""
import ast, importlib, inspect, json, os, re, shutil, sys
from pathlib import Path
from typing import get_args
root = Path(__file__).resolve().parents[1]
os.chdir(root); sys.path.insert(0, str(root))              # nbdev finds its settings from the working directory; the modules are those beside the notebooks
from fastcore.docments import docments
from fastcore.nbio import NbCell
from nbdev.export import ExportModuleProc
from nbdev.process import NBProcessor
from nbdev.showdoc import showdoc_nm

nbs,lib,skip = root/'nbs','sparsefast',('_', '.')

# What a reader wants, and the notebooks for it. Other explanations are evidence; a tutorial that is not named here stops the build, and so does a name without a notebook
groups = {
    'Start': ['index', 'tutorials/first_ten_minutes', '00_core', 'tutorials/choosing'],
    'Tutorials': ['tutorials/vision', 'tutorials/tabular', 'tutorials/text', 'tutorials/plain_pytorch', 'tutorials/hugging_face', 'tutorials/lightning'],
    'How-to': ['tutorials/pretrained', 'tutorials/prune_a_transformer', 'tutorials/averages', 'tutorials/resume', 'tutorials/large_batches', 'tutorials/distributed', 'explanations/sharded', 'explanations/gpu',
               'tutorials/ship', 'explanations/write_your_own'],
    'Evidence': ['explanations/which_method', 'explanations/which_models', 'explanations/when_is_sparse_faster', 'results'],
    'Project': ['explanations/code_map', 'explanations/how_the_kernel_works', 'explanations/from_paper_to_code']}
# Rooms by number: a group reaches to the next one's first
rooms = [(1, 'Foundations'), (3.5, 'Engine'), (5.2, 'In loops')]
# Wings: a folder of rooms, and its caption
wings = dict(loops='In other trainers', storage='Compressed layers', see='See it', ship='Ship it', cli='Command line')
# Files beside the notebooks that are pages of the group "Project"
files = dict(changelog='CHANGELOG.md', contributing='CONTRIBUTING.md', conduct='CODE_OF_CONDUCT.md', security='SECURITY.md', citing='CITATION.cff')
# Words that people search for, on the page that answers them
keywords = {'index': 'install pip setup requirements lottery ticket', 'tutorials/pretrained': 'pretrained prune pruning finetune fine tune checkpoint lottery ticket',
            'tutorials/prune_a_transformer': 'prune pruning pretrained llm language model one shot Wanda', 'one_shot': 'prune pruning', 'tutorials/ship': 'speed up faster inference deploy quantize quantization int8 onnx',
            'explanations/when_is_sparse_faster': 'speed up faster latency benchmark quantize quantization int8 fp16 bfloat16', 'explanations/gpu': 'cuda fp16 amp half mixed precision speed up memory',
            'explanations/which_method': 'lottery ticket compare accuracy', 'saliency': 'prune at initialization lottery ticket', 'tutorials/resume': 'resume checkpoint interrupted continue restart',
            'tutorials/averages': 'ema swa average weights', 'tutorials/distributed': 'ddp multi gpu several gpus devices', 'explanations/sharded': 'fsdp tensor parallel', 'callback': 'fp16 mixed precision fastai',
            'ship/export': 'onnx quantize quantization', 'tutorials/plain_pytorch': 'fp16 amp GradScaler mixed precision'}

# ------------------------------------------------------------ notebooks and their names
def notebooks():
    "All pages: path from `nbs` -> name of the page, without number and ending"
    fns = [p.relative_to(nbs) for p in sorted(nbs.rglob('*.ipynb')) if not any(o.startswith(skip) for o in p.relative_to(nbs).parts)]
    return {f.as_posix(): (f.parent/re.sub(r'^\d+[a-z]*_', '', f.stem)).as_posix() for f in fns}

def directives(src): return {m[1]: m[2].strip() for m in re.finditer(r'^#\|\s*([\w-]+):?(.*)$', src, re.M)}

def bare(src): return re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')

def _text(o): return ''.join(o) if isinstance(o, list) else o or ''

# ------------------------------------------------------------ names and their documentation
def names_in(src):
    "Public names that a cell defines: functions and classes (`Learner.sparsify` for a patch), and constants"
    defs,consts = [],[]
    for o in ast.parse(src).body:
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)):
            nm = showdoc_nm(o)
            defs += [n for n in ([nm] if isinstance(nm, str) else nm) if not re.search(r'(^|\.)_|\.(before|after)_', n)]     # nor a callback's events
        elif isinstance(o, ast.Assign): consts += [t.id for t in o.targets if isinstance(t, ast.Name) and not t.id.startswith('_')]
    return defs, consts

def _find(nm, mod):
    o = importlib.import_module(f'{lib}.{mod}')
    for part in nm.split('.'): o = getattr(o, part)
    return o

def _cell(s): return str(s).replace('|', r'\|').replace('\n', ' ')

def _name(o):
    if o is None or isinstance(o, (str, int, float, bool, tuple, list, dict)): return repr(o)
    func = getattr(o, 'func', None)                          # a partial
    return _name(func) if func is not None else getattr(o, '__name__', None) or re.sub(r' at 0x\w+', '', repr(o))

def _type(anno):
    "Before what a result is"
    return '' if anno in (object, inspect.Signature.empty) else f"`{'|'.join('None' if a is type(None) else _name(a) for a in get_args(anno) or [anno])}`: "

def signature(nm, f):
    "One line if it fits, else a parameter a line"
    try: ps = inspect.signature(f).parameters.values()
    except (TypeError, ValueError): return nm
    star,args = False,[]
    for p in ps:
        if p.name=='self': continue
        if p.kind==p.KEYWORD_ONLY and not star and not any(a.startswith('*') for a in args): args.append('*')
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        args.append({p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name + ('' if p.default is p.empty else f'={_name(p.default)}'))
    one = f"{nm}({', '.join(args)})"
    if len(one)<=78: return one
    lines,line = [],'   '
    for a in args:
        if len(line)+len(a)>76: lines.append(line); line = '   '
        line += f' {a},'
    return f'{nm}(\n' + '\n'.join([*lines, line.rstrip(',')]) + ')'

def documented(o):
    "docments of `o`; of parameters that it passes on, those of the function it passes them to"
    try: docs = docments(o, full=True)
    except (TypeError, ValueError): return {}
    to = getattr(o, '__delwrap__', None)
    if getattr(to, '__name__', '')=='__init__': to = to.__globals__.get(to.__qualname__.split('.')[0])      # a dataclass's has no source
    more = documented(to) if to is not None else {}
    if more: docs = {k: docs.get(k) or {} for k in [*inspect.signature(o).parameters, 'return']}
    return {k: d if d.get('docment') or k=='return' else more.get(k, d) for k,d in docs.items()}

def doc(nm, mod, level):
    "A heading with the name, signature, docstring and a table of parameters, as Markdown"
    o = _find(nm, mod)
    text = re.split(r'(?:^|\n\n)(?:Args|Returns):\n', inspect.getdoc(o) or '')[0]          # the table below has what follows
    parts = [f"{'#'*level} `{nm}`", f'```python\n{signature(nm, o)}\n```', re.sub(r'(\n *){2,}', '\n\n', text)]
    docs = documented(o)
    rows = [f"| `{k}` | {_cell(d['docment'])} |" for k,d in docs.items() if k not in ('self', 'return') and d.get('docment')]
    ret = docs.get('return') or {}
    if ret.get('docment') and ret['anno'] is not None: rows.append(f"| *returns* | {_cell(_type(ret['anno'])+ret['docment'])} |")    # (with `None` it is the comment of `**kwargs` above)
    if rows: parts.append('\n'.join([':::{container} docments', '', '| | |', '|---|---|', *rows, '', ':::']))
    return '\n\n'.join(p for p in parts if p)

# ------------------------------------------------------------ links
def slug(s):
    "Of a heading; a dot stays, as in `Learner.sparsify`"
    return re.sub(r'[^\w.\- ]', '', s.lower()).strip().replace(' ', '-')

def targets():
    "Each public name of `core` -> the page and heading that document it; a constant has no heading of its own, and is under the one above"
    core,res = importlib.import_module(f'{lib}.core'),{}
    for fn,page in notebooks().items():
        mod,cells = read(fn)
        if mod in (None, 'core'): continue
        head = ''
        for c in cells:
            if c['cell_type']!='code': head = ([head]+re.findall(r'^#+ (.+)$', c['source'], re.M))[-1]
            elif 'export' in directives(c['source']):
                defs,consts = names_in(c['source'])
                res |= {n: (fn, n) for n in defs if n in core.__all__ or '.' in n} | {n: (fn, head) for n in consts if n in core.__all__}
    return res

_skip = re.compile(r'(^ *(?:```|~~~).*?^ *(?:```|~~~)|^#+ .*?$|^ {4}.*?$|!?\[[^\]]*\]\([^)]*\)|\$\$.*?\$\$)', re.M|re.S)

def link_names(md, tgts, fn, here=()):
    "Make `name` a link, outside code (indented too), headings and links; not to the heading it stands under"
    def one(m):
        t = tgts.get(m[1])
        if t is None or m[1] in here: return m[0]
        return f"[{m[0]}]({os.path.relpath(t[0], Path(fn).parent)}#{slug(t[1])})"
    parts = _skip.split(md)
    return ''.join(p if i%2 else re.sub(r'(?<![`\w\[])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)', one, p) for i,p in enumerate(parts))

def rename(md, fn, names):
    "Links to notebooks become links to their pages"
    def one(m):
        path,frag = m[1],m[2] or ''
        t = os.path.normpath((Path(fn).parent/path).as_posix())
        return f"]({os.path.relpath(names[t], Path(names[fn]).parent)}.ipynb{frag})" if t in names else m[0]
    return re.sub(r'\]\((?!\w+:)([\w./-]+\.ipynb)(#[^)]*)?\)', one, md)

# ------------------------------------------------------------ pages
def read(fn):
    "The module of a notebook, and its cells, as text"
    cells = json.loads((nbs/fn).read_text(encoding='utf-8'))['cells']
    for c in cells: c['source'] = _text(c['source'])
    mods = [d['default_exp'] for c in cells if 'default_exp' in (d := directives(c['source']))]
    return (mods or [None])[0], cells

def _md(src): return dict(cell_type='markdown', metadata={}, source=src)

def _code(c, src, *tags, alt=''):
    return dict(cell_type='code', metadata={'tags': list(tags), **({'mystnb': {'image': {'alt': alt}}} if alt else {})}, source=src, execution_count=None, outputs=c.get('outputs', []))

def _opening(md):
    "The quoted summary under a title, as a paragraph of its own look"
    return re.sub(r'\A(# .+\n+)> (.+)', r'\1:::{container} lede\n\2\n:::', md)

def page(fn, tgts, names):
    "A page's cells"
    mod,cells = read(fn)
    res,level,head = [],1,''
    def text(md, here=()): return rename(link_names(md, tgts, fn, here), fn, names)
    for c in cells:
        src,d = c['source'],directives(c['source'])
        if not src.strip() or 'hide' in d or 'default_exp' in d or d.get('include')=='false': continue
        if c['cell_type']!='code':
            src = bare(src)
            heads = re.findall(r'^(#+) (.+)$', re.sub(r'^```.*?^```', '', src, flags=re.M|re.S), re.M)
            if heads: level,head = len(heads[-1][0]), heads[-1][1]
            res.append(_md(text(_opening(src))))
        elif 'export' in d:
            src = bare(src)
            defs,consts = names_in(src)
            body = ast.parse(src).body
            if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body) or any(c.startswith('_all_') for c in re.findall(r'^\w+', src, re.M)): continue
            for nm in defs: res += [_index([nm], fn), _md(text(doc(nm, mod, min(level+1, 4)), (nm,)))]
            if consts: res.append(_index(consts, fn))
            folded = not (consts and not defs)
            if folded and not defs and res and 'hide-input' in res[-1]['metadata'].get('tags', []): res[-1]['source'] += f'\n\n{src}'      # helpers after one another: one fold
            else: res.append(_code({}, src, *(['hide-input'] if folded else [])))
        else: res.append(_code(c, bare(src), *(['remove-input'] if d.get('echo')=='false' else []), alt=re.sub(r'[`*\[\]]', '', head)))
    return res

def _index(nms, fn):
    "The place that the index of names leads to; a name that only the engine uses has none"
    public = {*importlib.import_module(f'{lib}.all').__all__, 'Learner'}
    return _md('\n'.join(f'```{{index}} {nm}\n```' for nm in nms if nm.split('.')[0] in public or fn.startswith(('loops/', 'ship/05_hub', 'cli/04', 'cli/05'))))

def title(fn): return next((m[1] for c in read(fn)[1] if c['cell_type']=='markdown' and (m := re.search(r'^# (.+)$', c['source'], re.M))), fn)

def summary(fn): return next((m[1] for c in read(fn)[1] if c['cell_type']=='markdown' and (m := re.search(r'^> (.+)$', c['source'], re.M))), '').replace('`', '')

def _number(f):
    "The place of a room among its neighbours: 5 for `05_`, 5.2 for `05b_`"
    n,letter = re.match(r'(\d+)([a-z]?)_', f).groups()
    return int(n) + ('abcdefghi'.index(letter)+1)/10 if letter else int(n)

def menu(names):
    "Captions, and the pages under each; stops at a tutorial that has no place, and at a place that has no notebook"
    res = {cap: [f'{o}.ipynb' for o in fns] for cap,fns in groups.items()}
    placed = {f for fns in res.values() for f in fns}
    if lost := {f for f in names if f.startswith('tutorials/')}-placed: raise SystemExit(f'no place in the menu: say in docs/pages.py where {sorted(lost)} belong')
    if gone := placed-set(names): raise SystemExit(f'no such notebook: {sorted(gone)}, which docs/pages.py has in the menu')
    res['Evidence'][-1:-1] = sorted((f for f in names if f.startswith('explanations/') and f not in placed), key=title)
    return {cap: [names[f] for f in fns] for cap,fns in res.items()}

def api(names):
    "Captions of the API, and the notebooks of the rooms under each"
    def group(f): return max(i for i,(n,_) in enumerate(rooms) if n<=_number(f))
    numbered = [f for f in names if re.match(r'(?!00_)\d', f)]
    return {**{cap: [f for f in numbered if f!='00a_all.ipynb' and group(f)==i] for i,(_,cap) in enumerate(rooms)}, **{cap: [f for f in names if f.startswith(f'{wing}/')] for wing,cap in wings.items()}}

def toctree(pages, caption=''): return '\n'.join(['```{toctree}', ':hidden:', *([f':caption: {caption}'] if caption else []), '', *('Home <self>' if p=='index' else p for p in pages), '```'])

def write_api(out, names, tgts):
    "A page for each group of rooms, and one with the names that most scripts need; returns the pages"
    (out/'api').mkdir()
    lines = [f'- [`{nm}`](../{names[fn]}.ipynb#{slug(nm)}): {inspect.getdoc(o).partition(chr(10))[0]}' for nm,(fn,_) in tgts.items() if '.' not in nm and callable(o := _find(nm, 'core'))]
    (out/'api'/'names.md').write_text('\n'.join(['# Names for scripts', '', 'All that `from sparsefast.core import *` imports. Each name links to its page, with its parameters, examples and source.', '', *lines, '']), encoding='utf-8')
    for cap,fns in api(names).items():
        lines = [f'- [{title(f)}](../{names[f]}.ipynb): {summary(f)}' for f in fns]
        (out/'api'/f'{slug(cap)}.md').write_text('\n'.join([f'# {cap}', '', *lines, '', toctree([f'/{names[f]}' for f in fns]), '']), encoding='utf-8')
    return ['api/names', 'all', *(f'api/{slug(cap)}' for cap in api(names)), 'Index of names <genindex>']

def write_files(out):
    "The files beside the notebooks, as pages; returns the pages"
    for nm,f in files.items():
        text = (root/f).read_text(encoding='utf-8')
        if f.endswith('.cff'): text = f'# Citing\n\nIf you publish results, please cite the paper of the method that you used; its docstring names it. Cite this library, too:\n\n```yaml\n{text}```\n'
        for page,of in files.items(): text = text.replace(f']({of})', f']({page}.md)')
        (out/f'{nm}.md').write_text(text, encoding='utf-8')
    return list(files)

def build(out):
    "Write all pages to the folder `out`"
    names,tgts = notebooks(),targets()
    if len(set(names.values()))<len(names): raise SystemExit(f'two notebooks want the same page: {sorted(names.values())}')
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    caps = menu(names)
    caps = {**{cap: caps[cap] for cap in caps if cap!='Project'}, 'API': write_api(out, names, tgts), 'Project': write_files(out)+caps['Project']}
    for fn,nm in names.items():
        cells = page(fn, tgts, names) + [_md(f'---\nMade from a notebook: {{download}}`nbs/{fn} <{os.path.relpath(nbs/fn, (out/nm).parent)}>`')]
        if fn=='index.ipynb': cells += [_md(toctree(pages, cap)) for cap,pages in caps.items()]
        for i,c in enumerate(cells): c['id'] = f'c{i}'
        meta = {'description': summary(fn), 'property=og:title': title(fn), 'property=og:description': summary(fn), 'property=og:type': 'article', 'property=og:site_name': lib}
        if nm in keywords: meta['keywords'] = keywords[nm].replace(' ', ', ')
        (out/nm).parent.mkdir(parents=True, exist_ok=True)
        (out/f'{nm}.ipynb').write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=dict(myst=dict(html_meta=meta), kernelspec=dict(name='python3', display_name='Python 3', language='python'), language_info=dict(name='python')))))
