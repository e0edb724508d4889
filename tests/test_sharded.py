"Models cut up by `fully_shard`, on gloo: the pieces of two and of three processes together are what one process has, bit for bit"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
import sharded_worker as worker
from helpers import *

HERE = os.path.dirname(__file__)
def launch(n, script, *args, cwd=None):
    "As a user would: torch.distributed.run with `n` processes"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', str(script), *map(str, args)],
                       capture_output=True, text=True, timeout=600, cwd=cwd, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert p.returncode==0, p.stderr[-3000:]
    return p.stdout

def work(n, folder):
    "`n` processes that find each other by a file; they start at once, without a parent"
    args = [sys.executable, '-W', 'ignore', f'{HERE}/sharded_worker.py', str(folder), str(n)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    started = [subprocess.Popen([*args, str(r)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) for r in range(n)]
    try: said = [p.communicate(timeout=600)[1] for p in started]
    finally:
        for p in started: p.kill()
    assert not any(p.returncode for p in started), '\n'.join(s[-3000:] for s in said)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('sharded')

@pytest.fixture(scope='module')
def three(folder):
    work(3, folder)
    return lambda name: [torch.load(folder/f'{name}_{r}', weights_only=True) for r in range(3)]

@pytest.fixture(scope='module')
def two(folder, three):
    "After the three, which leave checkpoints"
    work(2, folder)
    return lambda name: [torch.load(folder/f'{name}_{r}', weights_only=True) for r in range(2)]

def check(results, name, total):
    "Weights, masks, targets and optimizer state at the end, and masks after every tenth step"
    ref = worker.reference(name, total)
    for r in results:
        assert r['masked'] and not changed(ref['state'], r['state'])
        assert any(k.startswith('opt.') for k in r['state'])!=(name=='averaged_sgd')         # SGD without momentum has no state
        assert len(r['log'])==total//10 and all(same_masks(a, b) for a,b in zip(ref['log'], r['log']))
        if name in worker.LONG: assert (name=='static')==same_masks(r['log'][0], r['log'][-1])

@pytest.mark.parametrize('name', worker.THREE_LONG)
def test_three_processes_are_one(name, three):
    found = three(name)
    assert [r['own'] for r in found]==[[(3,8), (1,7)], [(3,8), (0,7)], [(1,8), (0,7)]]
    check(found, name, 200)

@pytest.mark.parametrize('name', [n for n in worker.RUNS if n not in (*worker.THREE_LONG, 'adam')])
def test_two_processes_are_one(name, two):
    found = two(name)
    if name in worker.LONG: assert [r['own'] for r in found]==[[(4,8), (1,7)], [(3,8), (0,7)]]
    check(found, name, 200 if name in worker.LONG else 40)

def test_attached(two): check(two('attached'), 'adam', 40)

@pytest.mark.parametrize('name', worker.SAVED)
def test_saved_on_three_resumed_on_two(name, three, two):
    "Between two updates, with gradients summed up"
    ref = worker.reference(name, 136)['state']
    assert changed(three(f'save_{name}')[0]['state'], ref)
    for r in two(f'resume_{name}'): assert r['masked'] and not changed(r['state'], ref)

def test_the_highest_scores_are_found_by_counting(three):
    for r in three('counted'): assert len(r)==15 and all(r.values()), r

def test_what_an_update_gathers(two):
    "Numbers only, where scores and rules do with pieces"
    for r in two('gathered'): assert [r[n] for n in ('adam', 'random', 'GMP', 'sampled')]==[1]*4 and (r['SNFS'], r['nm'])==(56, 160), r

def test_masks_made_after_fully_shard(two):
    for r in two('late'): assert r==dict.fromkeys(['random', 'erk', 'magnitude', 'pattern', 'init'], True)

def test_a_model_made_on_the_meta_device(two):
    for r in two('meta'):
        assert r['trained'] and r['whole since'] and r['cut up since']
        for said in r['whole']+r['cut up']: assert 'has no values: it was made on the meta device' in said, said

def test_a_whole_model_with_masks_without_values_is_left_alone():
    from sparsefast.attach import attach
    from sparsefast.sparsify import sparsify_model, unsparsify_model
    with torch.device('meta'): model = worker.mlp(8, 7, 4)
    sparsify_model(model, .5)
    model.to_empty(device='cpu')
    for p in model.parameters(): torch.nn.init.ones_(p)
    for b in model.buffers(): b.zero_()
    with pytest.raises(ValueError, match='has no values'): attach(worker.RigL(update_every=4), model, worker.adam(model.parameters()), 40)
    unsparsify_model(model)
    assert all((p==1).all() for p in model.parameters())

def test_placements(two):
    for r in two('placements'):
        assert all(r[k] is True for k in ('hybrid', 'hybrid_cut', 'columns', 'tensor')) and r['kinds']==['S(0)', 'S(1)']
        assert '`weight` of' in r['strided'] and 'sharded over processes as _StridedShard' in r['strided'] and 'use one of the two' in r['strided']

def test_orders_and_sentences(two):
    for r in two('orders'):
        assert r['attach_after_evaluation']=='nothing'
        for k in ('masked_before_forward_True', 'masked_before_forward_False', 'summary', 'loaded', 'undone', 'half', 'nan'): assert r[k] is True, k
        for k in ('save', 'compress', 'fastest', 'bake', 'shrink'): assert "model must be whole, got '0.weight'" in r[k] and 'load_sparse_state' in r[k]
        assert 'masks must be the same in every process' in r['seeds'] and 'make the optimizer after' in r['early_optimizer']
        assert 'is sharded over processes, and this method trains weights outside the masks' in r['exploring']

def test_the_script_of_the_page(tmp_path):
    "Half of it on two processes, the rest on one"
    page = Path(HERE).parent/'nbs'/'explanations'/'sharded.ipynb'
    text = next(t for c in json.loads(page.read_text())['cells'] if 'train_sharded.py' in (t := ''.join(c['source'])))
    (tmp_path/'train_sharded.py').write_text(text.split('```python\n')[1].split('```')[0])
    said = [launch(n, 'train_sharded.py', until, cwd=tmp_path) for n,until in ((2, 60), (1, 80))]
    for out,step in zip(said, (60, 80)):
        first,*table = [l for l in out.splitlines() if l]
        assert first.startswith(f'step {step}: ') and float(first.split()[2].rstrip('%'))>40 and '0.9000' in table[-2]
    assert (tmp_path/'digits.safetensors').stat().st_size<200_000
