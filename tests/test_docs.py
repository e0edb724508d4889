"Every public name says what it is, every parameter too; notebooks show what a reader may see, and their links lead somewhere"
import ast, importlib, inspect, json, pkgutil, pydoc, re, textwrap
from functools import cached_property
from pathlib import Path
import pytest
from fastcore.docments import docments, get_source
import sparsefast
from sparsefast._docments import documented

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
modules = sorted(m.name.removeprefix('sparsefast.') for m in pkgutil.walk_packages(sparsefast.__path__, 'sparsefast.') if not m.ispkg and '._' not in m.name)
notebooks = sorted(p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if not any(o.startswith(('_', '.')) for o in p.relative_to(nbs).parts))

# ------------------------------------------------------------ names and parameters
def own_names(mod):
    "Public names that are defined in a module"
    m = importlib.import_module(f'sparsefast.{mod}')
    tree = ast.parse(Path(m.__file__).read_text(encoding='utf-8'))
    here = {o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef))} | {n.id for o in tree.body if isinstance(o, ast.Assign) for t in o.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return m, [nm for nm in getattr(m, '__all__', []) if nm in here]

def own_nodes(o):
    "Nodes of a function's body, without those of functions within it"
    todo = [*o.body]
    while todo:
        yield (n := todo.pop())
        if not isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): todo += ast.iter_child_nodes(n)

def silent(f):
    "Does a function that returns or yields something fail to say, by its source, of what type it is, and what?"
    if inspect.isclass(f) or not (src := get_source(f)): return False
    o = ast.parse(src := textwrap.dedent(src)).body[0]
    if not isinstance(o, ast.FunctionDef): return False                                # a lambda
    if o.returns is None:
        return any(isinstance(n, (ast.Yield, ast.YieldFrom)) or isinstance(n, ast.Return) and n.value is not None and ast.unparse(n.value)!='None' for n in own_nodes(o))
    return ast.unparse(o.returns)!='None' and '#' not in src.splitlines()[o.returns.lineno-1]        # (docments would take the comment of `**kwargs` above)

def undocumented(f):
    "What is missing from a function, class or property, in words"
    if isinstance(f, (property, cached_property)): return [] if f.__doc__ else ['a docstring']
    doc = inspect.getdoc(f) if f.__doc__ else ''
    if not doc or doc.startswith(f'{f.__name__}('): return ['a docstring']             # a dataclass's own is its signature

    docs,to = docments(f, full=True),getattr(f, '__delwrap__', None)
    passed = set(inspect.signature(to).parameters) if to is not None else set()        # documented where they are passed to
    lacks = [k for k,d in docs.items() if k not in ('self', 'cls', 'return') and d.get('kind') not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) and k not in passed and not d.get('docment')]
    return lacks + (['return'] if silent(f) else [])

def commented(mod, nm):
    "Does a comment stand above a constant's group of lines, or beside it?"
    src = Path(mod.__file__).read_text(encoding='utf-8')
    lines,at = src.splitlines(),[o for o in ast.parse(src).body if isinstance(o, ast.Assign) and nm in {n.id for t in o.targets for n in ast.walk(t) if isinstance(n, ast.Name)}]
    if not at: return False
    i = at[0].lineno-1
    if '#' in lines[i]: return True
    while i>0 and lines[i-1].strip() and not lines[i-1].startswith('# %%'):
        i -= 1
        if lines[i].startswith('#'): return True
    return False

@pytest.mark.parametrize('mod', modules)
def test_every_public_name_and_parameter_is_documented(mod):
    m,names = own_names(mod)
    lacks = {}
    for nm in names:
        o = getattr(m, nm)
        if inspect.isclass(o) or inspect.isroutine(o) or isinstance(o, property): miss = undocumented(o)
        else: miss = [] if commented(m, nm) else ['a comment']
        if miss: lacks[nm] = miss
    assert not lacks

def test_the_check_sees_what_is_missing():
    def bare(x): return x
    def half(x, # something
             y): "Adds"
    def whole(x, # something
        y): # something else
        "Adds"
        return x+y
    assert undocumented(bare)==['a docstring'] and undocumented(half)==['y'] and undocumented(whole)==['return']

def test_the_check_sees_results_that_are_not_described():
    def unread(): # A number
        "Of what type?"
        return 1
    def bare()->int:
        "What number?"
        return 1
    def of_kwargs(
        **kwargs # The arguments, not the result
    )->dict:
        "The comment is that of another line"
        return kwargs
    def gives(): # An iterator
        "Nothing is returned"
        yield 1
    def whole()->int: # A number
        "All is said"
        return 1
    def within():
        "The result is another function's"
        def f(): return 1
        f()
    def nothing():
        "Leaves early"
        if undocumented: return None
    assert [undocumented(f) for f in (unread, bare, of_kwargs, gives)]==[['return']]*4
    assert [undocumented(f) for f in (whole, within, nothing)]==[[]]*3

def patched(mod):
    "Public methods that a module gives to classes by `patch`, from its source"
    m = importlib.import_module(f'sparsefast.{mod}')
    for o in ast.parse(Path(m.__file__).read_text(encoding='utf-8')).body:
        if isinstance(o, ast.FunctionDef) and not o.name.startswith('_') and any('patch' in ast.unparse(d) for d in o.decorator_list):
            cls = o.args.args[0].annotation
            if isinstance(cls, ast.Name) and not o.name.startswith(('before_', 'after_')) and not overrides(getattr(m, cls.id), o.name): yield f'{cls.id}.{o.name}', getattr(getattr(m, cls.id), o.name)

@pytest.mark.parametrize('mod', modules)
def test_every_patched_method_is_documented(mod):
    assert not {nm: miss for nm,f in patched(mod) if (miss := undocumented(f))}

def overrides(cls, name):
    "Does a base class of ours document a method of this name? Then its docs hold for the one that takes its place"
    return any(name in vars(base) and base.__module__.startswith('sparsefast') for base in cls.__mro__[1:])

def members(mod):
    "Public methods and properties in the bodies of a module's public classes; not events of a callback, nor what PyTorch documents"
    m,names = own_names(mod)
    for o in ast.parse(Path(m.__file__).read_text(encoding='utf-8')).body:
        if isinstance(o, ast.ClassDef) and o.name in names:
            for d in o.body:
                if isinstance(d, ast.FunctionDef) and not re.match('_|before_|after_|on_|(setup|teardown|forward|backward|extra_repr)$', d.name) and not overrides(getattr(m, o.name), d.name): yield f'{o.name}.{d.name}', getattr(getattr(m, o.name), d.name)

@pytest.mark.parametrize('mod', modules)
def test_every_method_and_property_in_a_class_is_documented(mod):
    assert not {nm: miss for nm,f in members(mod) if (miss := undocumented(f))}

def test_each_module_is_in_llms_txt():
    "nbdev lists those whose docstring has more than three lines"
    listed = re.findall(r'^- `sparsefast\.([\w.]+)`: .', (nbs/'llms.txt').read_text(encoding='utf-8'), re.M)
    assert sorted(listed)==modules

# ------------------------------------------------------------ `help(f)` and `f?`
def unhelpful(f):
    "What the comments say of parameters and result, and the docstring does not"
    f = f.fget if isinstance(f, property) else f.func if isinstance(f, cached_property) else f
    to = getattr(f, '__delwrap__', None)
    docs = {k: d.docment for k,d in docments(f, full=True).items() if d.docment and k not in ('self', 'cls') and (k!='return' or d.anno is not None)}
    def one(s): return s.replace('\n', ' ').replace(' *', ' ')
    text = one(inspect.getdoc(f))
    return [k for k,d in docs.items() if not (re.search(rf' {k}(, [\w*]+)*: {re.escape(one(d))}', text) or k=='return' and one(f'Returns:     {d}') in text or to is not None and f' {k}: ' in text)]

@pytest.mark.parametrize('mod', modules)
def test_docstrings_list_the_parameters(mod):
    m,names = own_names(mod)
    fs = {nm: getattr(m, nm) for nm in names if inspect.isclass(getattr(m, nm)) or inspect.isroutine(getattr(m, nm))}
    lacks = {nm: miss for nm,f in [*fs.items(), *patched(mod), *members(mod)] if callable(f) and f.__doc__ and (miss := unhelpful(f))}
    assert not lacks

@pytest.mark.parametrize('name,params', {'sparsify_model': 'model sparse_f keep', 'RigL': 'update_every keep_score_f seed', 'DynamicSparseTrainingCallback': 'sparse_modules stop_pct grad_steps seed', 'SparseRecorderCallback': ''}.items())
def test_help_lists_the_parameters(name, params):
    "Those that are passed on, too"
    text = pydoc.render_doc(getattr(importlib.import_module('sparsefast.all'), name), renderer=pydoc.plaintext)
    assert all(re.search(rf'^[ |]*    {p}: \S', text, re.M) for p in params.split()) and 'Args:' in text

def test_exporting_writes_comments_into_docstrings():
    src = 'def f(x, # A "path" of \\d\n    # Any\n    y=1,\n    *rest, # More\n)->int: # "One"\n    r"Adds"\n    return x\n\nclass C:\n    def _g(self, x): # Private\n        "Stays"\n'
    exec(compile(new := documented(src), '', 'exec'), here := {})
    assert inspect.getdoc(here['f'])=='Adds\n\nArgs:\n    x: A "path" of \\d\n    y: Any\n    *rest: More\nReturns:\n    "One"'
    assert new.startswith(src[:src.index('r"Adds"')]) and new.endswith(src[src.index('    return'):]) and documented('x = 1 # é\n')=='x = 1 # é\n'

# ------------------------------------------------------------ notebooks
def cells(fn):
    for c in json.loads((nbs/fn).read_text(encoding='utf-8'))['cells']: yield c['cell_type'], ''.join(c['source']), c.get('outputs', [])

def texts(out):
    "All that a stored output shows as text"
    for t in [out.get('text', ''), *out.get('data', {}).items()]:
        if isinstance(t, tuple):
            if t[0].startswith('image/') and t[0]!='image/svg+xml': continue
            t = t[1]
        yield ''.join(t) if isinstance(t, list) else str(t)

unwanted = {'a path of a machine': r'(?<![\w.])/(?:home|root|Users|tmp|var|work|usr/lib|private|mnt)/\w', 'a warning': r'\w*Warning\b[: ]', 'a progress bar': r'<progress|progress-bar|\d+%\|', 'an error': r'Traceback \(most recent|\x1b\[',
            'an address in memory': r' at 0x[0-9a-f]{6,}'}

def complaints(out):
    if out['output_type']=='error': return ['an error']
    if out.get('name')=='stderr': return ['stderr']
    return [nm for nm,r in unwanted.items() if any(re.search(r, t) for t in texts(out))]

@pytest.mark.parametrize('fn', notebooks)
def test_stored_outputs_hold_nothing_a_reader_should_not_see(fn):
    assert not [(why, src[:80]) for _,src,outs in cells(fn) for o in outs for why in complaints(o)]

@pytest.mark.parametrize('text', ['/home/someone/x.py', 'a UserWarning: oh', '<progress value=3>', ' 45%|####', 'Traceback (most recent call last)', '<function f at 0x7f12ab34cd>'])
def test_the_check_sees_unwanted_outputs(text): assert complaints(dict(output_type='stream', name='stdout', text=[text]))

@pytest.mark.parametrize('fn', notebooks)
def test_relative_links_of_notebooks_lead_somewhere(fn):
    prose = '\n'.join(re.sub(r'^```.*?^```|`[^`\n]*`', '', src, flags=re.M|re.S) for kind,src,_ in cells(fn) if kind=='markdown')
    links = [l for l in re.findall(r'\]\(([^)\s]+)\)', prose) if not re.match(r'\w+:|#', l)]
    assert not [l for l in links if not ((nbs/fn).parent/l.split('#')[0]).exists()]

@pytest.mark.parametrize('fn', notebooks)
def test_formulas_have_no_line_breaks(fn):
    r"Two backslashes before a letter are a line break and a letter, where a command such as \sqrt is meant"
    for c in json.loads((nbs/fn).read_text())['cells']:
        if c['cell_type']=='markdown': assert not re.search(r'\\\\[a-zA-Z]', ''.join(c['source']))

@pytest.mark.parametrize('fn', notebooks)
def test_a_notebook_has_a_title_and_a_summary(fn):
    first = next(src for kind,src,_ in cells(fn) if kind=='markdown')
    assert re.match(r'(?:#\|.*\n)*# .+\n\n> .+', first)

def test_every_notebook_that_prints_or_plots_has_outputs():
    "A notebook that was never executed would be an empty page"
    shows = r'^\s*(?:print\(|plt\.|learn\.fit)'
    assert not [fn for fn in notebooks if any(kind=='code' and re.search(shows, src, re.M) and '#| export' not in src for kind,src,_ in cells(fn)) and not any(outs for *_,outs in cells(fn))]

def test_every_tutorial_has_its_place_in_the_menu():
    src = (root/'docs'/'pages.py').read_text(encoding='utf-8')
    groups = ast.literal_eval(re.search(r'^groups = (\{.*?\})$', src, re.M|re.S)[1])
    files = [f'{o}.ipynb' for fns in groups.values() for o in fns]
    assert {f for f in notebooks if f.startswith('tutorials/')} <= set(files) <= set(notebooks) and len(set(files))==len(files)
