"Models cut up by `fully_shard`, on gloo: the pieces of two and of three processes together are what one process has, bit for bit"
import os, subprocess, sys
import pytest, torch
import sharded_worker as worker
from helpers import *

HERE = os.path.dirname(__file__)
def launch(n, script, *args):
    "As a user would: torch.distributed.run with `n` processes"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', f'--nproc_per_node={n}', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', str(script), *map(str, args)],
                       capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert p.returncode==0, p.stderr[-3000:]
    return p.stdout

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('sharded')

@pytest.fixture(scope='module')
def three(folder):
    launch(3, f'{HERE}/sharded_worker.py', folder, *worker.THREE)
    return lambda name: [torch.load(folder/f'{name}_{r}', weights_only=True) for r in range(3)]

@pytest.fixture(scope='module')
def two(folder, three):
    "After the three, which leave checkpoints"
    launch(2, f'{HERE}/sharded_worker.py', folder, *worker.TWO)
    return lambda name: [torch.load(folder/f'{name}_{r}', weights_only=True) for r in range(2)]

def check(results, name, total):
    "Weights, masks, targets and optimizer state at the end, and masks after every tenth step"
    ref = worker.reference(name, total)
    for r in results:
        assert r['masked'] and not changed(ref['state'], r['state']) and any(k.startswith('opt.') for k in r['state'])
        assert len(r['log'])==total//10 and all(same_masks(a, b) for a,b in zip(ref['log'], r['log']))
        assert (name=='static')==same_masks(r['log'][0], r['log'][-1])

@pytest.mark.parametrize('name', worker.LONG)
def test_three_processes_are_one(name, three):
    found = three(name)
    assert [r['own'][::2] for r in found]==[[(3,8), (2,7), (1,4)], [(3,8), (2,7), (0,4)], [(1,8), (0,7), (0,4)]]
    check(found, name, 200)

@pytest.mark.parametrize('name', [n for n in worker.RUNS if n not in worker.LONG])
def test_two_processes_are_one(name, two): check(two(name), name, 40)

def test_attached(two): check(two('attached'), 'RigL', 40)

@pytest.mark.parametrize('name', ['RigL', 'RigL_avg'])
def test_saved_on_three_resumed_on_two(name, three, two):
    ref = worker.reference(name, 136)['state']
    assert changed(three(f'save_{name}')[0]['state'], ref)
    for r in two(f'resume_{name}'): assert r['masked'] and not changed(r['state'], ref)
