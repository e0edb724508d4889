"""What the benchmarks share: rows of JSON beside each script, the machine, a mean with its spread, and the options of the command line."""
import argparse, json, platform, re
from pathlib import Path
from statistics import mean, stdev
import torch
from sparsefast.ship.deploy import processor

class Records:
    "The rows of a benchmark, in a file beside its script; of rows with the same key the last counts"
    def __init__(self, script, key=lambda r: r['name']): self.path,self.key = Path(script).with_suffix('.jsonl'),key

    def rows(self): return [json.loads(l) for l in self.path.read_text().splitlines()] if self.path.exists() else []

    def done(self): return {self.key(r): r for r in self.rows()}

    def add(self, row):
        with self.path.open('a') as f: f.write(json.dumps(row)+'\n')
        return row

    def lacking(self, plan, name, only=''):
        "Yield the runs of a plan whose name matches, and that have no row by then under their name or themselves"
        for run in plan:
            if re.search(only, name(*run)) and not {run, name(*run)} & self.done().keys(): yield run

def words(*run): return ' '.join(map(str, run))

def hardware(): return dict(cpu=processor(), threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version())

def where(rows, cpu='cpu'):
    "The machines and versions of rows, in a sentence each"
    seen = sorted({(r[cpu], r['threads'], r['torch'], r.get('python', '')) for r in rows})
    return ' '.join(f"Hardware: {c}, {n} thread. Versions: PyTorch {torch}{', Python '*bool(python)}{python}." for c,n,torch,python in seen)

def spread(values, digits=2):
    "Mean, standard deviation and number of seeds"
    if not values: return ''
    if len(values)==1: return f'{values[0]:.{digits}f} (1)'
    return f'{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({len(values)})'

def parser(doc, what='runs'):
    "Options of every benchmark"
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--only', default='', help=f'{what} whose name matches this regular expression')
    ap.add_argument('--table', action='store_true', help='only print the tables')
    return ap

def run_lacking(doc, records, plan, name, data, train, table, shown):
    "Train what a benchmark lacks, each run with one thread, and print its table: what most scripts here do"
    args = parser(doc).parse_args()
    torch.set_num_threads(1)
    given = None if args.table else data()
    for run in [] if args.table else records.lacking(plan(), name, args.only):
        row = records.add(train(given, *run))
        print(row['name'], row[shown], row['cpu_seconds'], flush=True)
    print(table())
