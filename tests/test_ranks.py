"Two processes on gloo: the same masks, weights and optimizer state on both, bit for bit, after every update"
import os, subprocess, sys
from types import SimpleNamespace
import pytest, torch
import ranks_worker as worker
from sparsefast.all import *
from sparsefast.ranks import agree, group_of
from helpers import *

HERE = os.path.dirname(__file__)
def launch(folder, *cases):
    "As a user would: torch.distributed.run with two processes"
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', f'{HERE}/ranks_worker.py', str(folder), *cases],
                       capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert p.returncode==0, p.stderr[-3000:]

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    launch(folder, *worker.CASES)
    return lambda name: [torch.load(folder/f'{name}_{r}', weights_only=True) for r in range(2)]

EQUAL = [n for n in worker.CASES if n not in ('messages', 'other_layers', 'doctor', 'zero', 'fsdp')]
@pytest.mark.parametrize('name', EQUAL)
def test_equal_on_both(name, results):
    a,b = results(name)
    assert not changed(a['state'], b['state']) and any(k.startswith('opt.') for k in a['state'])
    assert len(a['log'])==24 and all(same_masks(i, j) for i,j in zip(a['log'], b['log'])) and not same_masks(a['log'][0], a['log'][-1])

@pytest.mark.parametrize('accumulate', [1, 2])
def test_equal_to_one_process_on_the_joined_batch(accumulate, results):
    "In float64, where the order of a sum decides nothing"
    a,_ = results('float64' if accumulate==1 else 'float64_accumulated')
    assert all(same_masks(i, j) for i,j in zip(a['log'], worker.whole(accumulate=accumulate)))

def test_no_message_beyond_what_an_update_needs(results):
    a,_ = results('messages')
    weights = -(-sum(p.numel() for p,*_ in sparse_params(worker.net()))//8)                  # the new masks, a bit a weight
    updates = sum(worker.method_of('RigL').due(step, (step-1)/24) for step in range(1, 25))
    assert a['seen']==[weights]*updates and updates>=4 and a['rebroadcast']==[]

def test_other_layers_are_refused(results):
    for r in results('other_layers'): assert 'rank 1 has masks for 4 buffers where rank 0 has 6' in r['error']

def test_zero_redundancy(results):
    "The case compares with a whole optimizer; here that each rank had a part, and what is refused"
    found = results('zero')
    assert all(r['own']>0 for r in found) and sum(r['own'] for r in found)==4*6
    for r in found:
        assert 'ZeroRedundancyOptimizer: a process has the momentum of its own parameters only' in r['momentum'] and 'works during the backward pass' in r['overlap'] and 'convert the model first' in r['convert']

def test_fsdp_1_is_refused_by_name(results):
    "On both, before anything is computed, whoever asks; a layer that it leaves alone trains"
    for said in results('fsdp'):
        assert len(said)==4*11
        for name,text in said.items():
            if name.endswith('unsharded'): assert text=='nothing'
            else: assert 'sharded over processes' in text and 'DistributedDataParallel' in text and 'leave this layer unsharded' in text and 'parametrized' not in text, (name, text)

def test_the_doctor_compares(results):
    for r in results('doctor'):
        assert {(f[0], f[1]) for f in r['before']}=={('fault', 'ranks')} and [f[2] for f in r['before']]==['0.weight', '2.weight', '4.weight']
        assert 'rank 1' in r['before'][0][3] and not any(f[1]=='ranks' for f in r['after'])

def test_in_fastai(tmp_path):
    pytest.importorskip('accelerate')
    launch(tmp_path, 'fastai')
    a,b = [torch.load(tmp_path/f'fastai_{r}', weights_only=True) for r in range(2)]
    assert not changed(a['state'], b['state']) and all(same_masks(i, j) for i,j in zip(a['log'], b['log'])) and not same_masks(a['log'][0], a['log'][-1])

def test_one_process_needs_nothing():
    model = worker.net()
    assert sync_masks(model) is model and group_of(model) is None and group_of([model]) is None
    agree([])
    learn = SimpleNamespace(model=model)                                              # as a Learner has it
    assert sync_masks(learn) is model and group_of(learn) is None
