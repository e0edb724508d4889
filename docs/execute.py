"""Execute notebooks in place and store clean outputs: `python docs/execute.py` for all, or with the notebooks to run

Progress-bar debris, second forms of a table and warnings of other people's imports are left out; consecutive printed lines are joined."""
import os, re, sys
from pathlib import Path
os.environ |= dict(PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')     # with one thread, outputs do not depend on the number of cores
import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

def _is_bar(o): return '<progress' in (h := o.get('data', {}).get('text/html', '')) or 'progress-bar' in h

def _is_empty(o): return 'text/html' in (d := o.get('data', {})) and not re.sub(r'<style>.*?</style>', '', d['text/html'], flags=re.S).strip()     # what `no_bar` leaves

def _no_source(md): return re.sub(r'\A---\n+\[source\]\(/blob.*\n+', '', md)     # a link to nowhere, as long as the project has no address

def clean(outputs):
    "The outputs a reader wants"
    res = []
    for o in outputs:
        if _is_bar(o) or _is_empty(o) or o.get('name')=='stderr': continue
        if 'class="fastprogress"' in o.get('data', {}).get('text/html', ''): o['data'] = {'text/html': o['data']['text/html']}
        if 'text/markdown' in o.get('data', {}): o['data'] = {'text/markdown': _no_source(o['data']['text/markdown'])}
        if o['output_type']=='stream' and res and res[-1]['output_type']=='stream': res[-1]['text'] += o['text']
        else: res.append(o)
    return res

def execute(fn):
    "Run all cells, flagged ones too, in the notebook's folder"
    nb = nbformat.read(fn, 4)
    NotebookClient(nb, timeout=3600, kernel_name='python3', resources={'metadata': {'path': fn.parent}}).execute()
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = clean(c.outputs)
    nbformat.write(nb, fn)
    nbdev_clean(str(fn))

if __name__=='__main__':
    nbs = Path(__file__).resolve().parents[1]/'nbs'
    for fn in map(Path, sys.argv[1:] or sorted(p for p in nbs.rglob('*.ipynb') if not p.relative_to(nbs).parts[0].startswith(('_','.')))):
        execute(fn)
        print(fn)
