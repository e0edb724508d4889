"A training that is stopped goes on as if nothing had happened: bit for bit, for each preset, whatever runs beside it"
import os, random, signal, subprocess, sys, warnings
from dataclasses import replace
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastai import optimizer as fo
from fastai.callback import fp16, schedule, training
from fastai.callback.core import CancelBatchException, Callback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.torch_core import set_seed
from helpers import *
from sparsefast import presets
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.checkpoint import *
from sparsefast.methods import DSTMethod
from sparsefast.patterns import nm_pattern
from sparsefast.storage import to_sparse_layers

CATALOGUE = {k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}
EPOCHS,N_ITER = 5,6

def preset_of(name):
    every = {} if name=='RigL_avg' else dict(batches_per_update=4 if name not in ('TopKAST', 'SR_STE', 'Static') else 1)
    return {**CATALOGUE[name], **every, 'replaces_step': False, **({'grad_steps': 4} if name=='SEFT' else {})}

def fresh(tmp, name='SET', seed=0, opt=None, cbs=(), bs=8, **kw):
    "A learner as a new process would make it: shuffled batches, dropout, other random masks; `seed` alone differs"
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8,24), nn.ReLU(), nn.Dropout(.2), nn.Linear(24,20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20,4))
    preset = preset_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sparsify_model(model, .5, **DSTMethod(**preset).start(.5))
        dst = DynamicSparseTrainingCallback(**preset)
    x,y = map(torch.cat, zip(*batches(N_ITER)))
    dls = DataLoaders(DataLoader(TensorDataset(x, y), bs=bs, shuffle=True, num_workers=0), DataLoader(TensorDataset(x[:16], y[:16]), bs=8, num_workers=0), device='cpu')
    learn = Learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=opt or partial(fo.SGD, mom=.9, wd=.01), lr=.05, path=tmp, cbs=[dst, *cbs], **kw)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

class Stop(Exception): pass
class PowerCut(Callback):
    "Stops everything at a batch of training"
    order = 65
    def __init__(self, epoch, batch=3): self.at = (epoch, batch)
    def after_batch(self):
        if self.training and (self.epoch, self.iter)==self.at: raise Stop('cut')

def one_cycle(learn, *cbs): learn.fit_one_cycle(EPOCHS, 1e-2, cbs=[CheckpointCallback('run'), *cbs])
def flat_cos(learn, *cbs): learn.fit_flat_cos(EPOCHS, 1e-2, cbs=[CheckpointCallback('run'), *cbs])
def tune(learn, *cbs): learn.fine_tune(3, 1e-2, freeze_epochs=2, cbs=[CheckpointCallback('run'), *cbs])

def stopped(make, fit, tmp, cut):
    with pytest.raises(Stop): fit(make(tmp), cut)
    fit(learn := make(tmp, seed=7))
    return learn

def everything(learn): return snapshot(learn.model, learn.opt)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('epoch', [0, 3])
@pytest.mark.parametrize('name', CATALOGUE)
def test_each_preset(name, epoch, tmp_path):
    whole = fresh(tmp_path/'a', name)
    one_cycle(whole)
    learn = stopped(partial(fresh, name=name), one_cycle, tmp_path/'b', PowerCut(epoch))
    assert not changed(everything(whole), everything(learn)) and masked_are_zero(learn.model)

@pytest.mark.parametrize('opt', dict(adam=fo.Adam, ranger=fo.ranger, adamw=wrapped(TORCH_OPTS['adamw']), nesterov=wrapped(TORCH_OPTS['nesterov'])).items(), ids=lambda o: o[0])
def test_each_optimizer(opt, tmp_path):
    make = partial(fresh, name='RigL', opt=opt[1])
    one_cycle(whole := make(tmp_path/'a'))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(2))
    assert not changed(everything(whole), everything(learn))

@pytest.mark.parametrize('fit', [flat_cos, tune])
@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_each_fit(fit, epoch, tmp_path):
    "fastai's own start_epoch is not known to fit_flat_cos, and fine_tune is two trainings"
    make = partial(fresh, splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    fit(whole := make(tmp_path/'a'))
    learn = stopped(make, fit, tmp_path/'b', PowerCut(epoch))
    assert not changed(everything(whole), everything(learn))

def test_in_the_second_phase_of_fine_tune(tmp_path):
    "Stopped in the third epoch of the second training, which the first does not have"
    make = partial(fresh, splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    tune(whole := make(tmp_path/'a'))
    learn = stopped(make, tune, tmp_path/'b', PowerCut(2, 1))
    assert not changed(everything(whole), everything(learn)) and learn.opt.frozen_idx==0

def test_with_start_epoch(tmp_path):
    one_cycle(whole := fresh(tmp_path/'a'))
    with pytest.raises(Stop): one_cycle(fresh(tmp_path/'b'), PowerCut(2))
    learn = fresh(tmp_path/'b', seed=3)
    learn.fit_one_cycle(EPOCHS, 1e-2, start_epoch=2, cbs=CheckpointCallback('run'))
    assert not changed(everything(whole), everything(learn))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('comp', [np.less, np.greater], ids=['best late', 'best early'])
@pytest.mark.parametrize('epoch', [1, 3, 4])
def test_beside_trackers(epoch, comp, tmp_path, capsys):
    "SaveModelCallback fails with fastai's start_epoch; here it, early stopping and the recorder go on where they were"
    make = lambda tmp, seed=0: fresh(tmp, seed=seed, cbs=[SaveModelCallback(fname='best', comp=comp), EarlyStoppingCallback(patience=9, comp=comp), ReduceLROnPlateau(patience=1, factor=2., comp=comp)])
    fit = lambda learn, *cbs: learn.fit(EPOCHS, .05, cbs=[CheckpointCallback('run'), *cbs])
    fit(whole := make(tmp_path/'a'))
    learn = stopped(make, fit, tmp_path/'b', PowerCut(epoch))
    assert not changed(everything(whole), everything(learn))
    a,b = whole.recorder,learn.recorder
    assert [list(v) for v in a.values]==[list(v) for v in b.values] and len(a.losses)==len(b.losses)==EPOCHS*N_ITER and torch.equal(torch.stack(list(a.losses)), torch.stack(list(b.losses)))
    for n in ('save_model', 'early_stopping', 'reduce_lr_on_plateau'): assert getattr(whole, n).best==getattr(learn, n).best
    assert learn.early_stopping.wait==whole.early_stopping.wait and (comp is np.less or whole.early_stopping.wait>=3) and all(cb.run for cb in learn.cbs)

@pytest.mark.parametrize('bs,n', [(8,32), (10,32), (10,20), (10,26)])
def test_half_an_accumulation(bs, n, tmp_path):
    "One accumulation is half done when the epoch ends, and with batches of 10 the last is smaller, so that batches do not tell how many steps were taken"
    make = partial(fresh, cbs=[training.GradientAccumulation(n)], bs=bs)
    one_cycle(whole := make(tmp_path/'a'))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(3))
    assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn)

def steps(learn): return learn.dynamic_sparse_training.n_step

class LeaveOut(Callback):
    "Leaves batches out at an event, as a guard against outliers does"
    def __init__(self, event='after_loss'): setattr(self, event, self.leave)
    def leave(self):
        if self.training and (3*self.epoch+self.iter)%5<2: raise CancelBatchException('left out')

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CATALOGUE)
def test_batches_left_out(name, tmp_path):
    "Each preset, when fewer steps than batches were taken before the cut"
    make = lambda tmp, seed=0: fresh(tmp, name, seed=seed, cbs=[LeaveOut()])
    one_cycle(whole := make(tmp_path/'a'))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(3))
    assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn)==EPOCHS*N_ITER-12

@pytest.mark.parametrize('opt', [None, wrapped(TORCH_OPTS['adamw'])], ids=['fastai', 'torch'])
@pytest.mark.parametrize('acc', [[], [20]], ids=['each', 'accumulated'])
@pytest.mark.parametrize('event', ['after_loss', 'before_backward', 'after_backward'])
def test_batches_left_out_at_an_event(event, acc, opt, tmp_path):
    "A batch left out after its backward pass leaves its gradient to the next, also over the end of an epoch"
    make = lambda tmp, seed=0: fresh(tmp, 'RigL', seed=seed, opt=opt, bs=10, cbs=[LeaveOut(event), *map(training.GradientAccumulation, acc)])
    one_cycle(whole := make(tmp_path/'a'))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(3))
    assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('acc', [None, 20])
@pytest.mark.parametrize('scale', [2.**14, 2.**22])
@pytest.mark.parametrize('name', ['SET', 'RigL', 'RigL_avg', 'SNFS', 'TopKAST', 'GraNet'])
def test_mixed_precision(name, scale, acc, cpu_amp, tmp_path):
    "The scale grows each five steps; from 2**22 it falls first, and steps are left out"
    def make(tmp, seed=0):
        cbs = [training.GradientAccumulation(acc)] if acc else []
        return fresh(tmp, name, seed=seed, bs=10 if acc else 8, cbs=cbs).to_fp16(init_scale=scale, growth_interval=5)
    scales,left_out = [],[]
    one_cycle(whole := make(tmp_path/'a'), Watch('after_batch', lambda l: scales.append(l.scaler.get_scale())), Watch('after_cancel_step', lambda l: left_out.append(l.mixed_precision.skipped)))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(3))
    assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn) and len(set(scales))>2
    assert scale<2**20 or left_out.count(True)>3

@pytest.mark.parametrize('acc', [None, 20])
@pytest.mark.parametrize('name', ['SET', 'RigL', 'RigL_avg'])
def test_compressed_layers(name, acc, tmp_path):
    "An update needs what all the batches of its accumulation have multiplied, those before the cut too"
    def make(tmp, seed=0):
        learn = fresh(tmp, name, seed=seed, bs=10, cbs=[LeaveOut(), *([training.GradientAccumulation(acc)] if acc else [])])
        to_sparse_layers(learn, least=0.)
        learn.dynamic_sparse_training.method = replace(learn.dynamic_sparse_training.method, batches_per_update=2)
        return learn
    one_cycle(whole := make(tmp_path/'a'))
    for epoch in (2, 3, 4):
        learn = stopped(make, one_cycle, tmp_path/f'b{epoch}', PowerCut(epoch))
        assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn)

@pytest.mark.parametrize('seed', [42, None])
def test_chance_is_in_the_file(seed, tmp_path):
    "Without a seed a resumed run takes chance up where it was; and what is drawn after a training is the same too"
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())
    fit = lambda learn, *cbs: learn.fit(4, .05, cbs=[CheckpointCallback('run', seed=seed), *cbs])
    def make(tmp, seed=0):
        set_seed(seed)
        return fresh(tmp, seed=seed)
    fit(whole := make(tmp_path/'a'))
    drawn = draw()
    learn = stopped(make, fit, tmp_path/'b', PowerCut(2))
    assert not changed(everything(whole), everything(learn)) and draw()==drawn
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(learn := make(tmp_path/'b', seed=9))                                              # it is finished
    assert not changed(everything(whole), everything(learn)) and draw()==drawn

class OwnAccumulation(training.GradientAccumulation): pass
def test_subclasses_and_two_of_a_kind(tmp_path):
    "fastai's callbacks are found by what they are, not by their name, which two trackers may share"
    def make(tmp, seed=0):
        return fresh(tmp, seed=seed, bs=10, cbs=[OwnAccumulation(20), EarlyStoppingCallback(patience=9), EarlyStoppingCallback(monitor='train_loss', patience=9)])
    one_cycle(whole := make(tmp_path/'a'))
    learn = stopped(make, one_cycle, tmp_path/'b', PowerCut(3))
    trackers = lambda l: [(cb.best, cb.wait) for cb in l.cbs if isinstance(cb, EarlyStoppingCallback)]
    assert not changed(everything(whole), everything(learn)) and steps(whole)==steps(learn) and len(trackers(whole))==2 and trackers(whole)==trackers(learn)

def test_finished(tmp_path):
    one_cycle(whole := fresh(tmp_path))
    with pytest.warns(UserWarning, match='run.pth is of a training that is finished.*resume=False'): one_cycle(learn := fresh(tmp_path, seed=4))
    assert not changed(everything(whole), everything(learn)) and all(cb.run for cb in learn.cbs)
    learn.fit_one_cycle(1, 1e-2, cbs=CheckpointCallback('run', resume=False))
    assert changed(everything(whole), everything(learn))

def test_other_length_warns(tmp_path):
    with pytest.raises(Stop): one_cycle(fresh(tmp_path), PowerCut(2))
    with pytest.warns(UserWarning, match='of a training of 5 epochs, and this one has 7'): fresh(tmp_path).fit_one_cycle(7, 1e-2, cbs=CheckpointCallback('run'))

def test_every_second_epoch_and_the_last(tmp_path):
    seen = []
    learn = fresh(tmp_path)
    cb = CheckpointCallback('run', every=2)
    learn.fit(EPOCHS, cbs=[cb, Watch('after_epoch', lambda l: seen.append(torch.load(tmp_path/'models'/'run.pth')['epoch'] if (tmp_path/'models'/'run.pth').exists() else None), 2000)])
    assert seen==[0, 2, 2, 4, 5]

@pytest.mark.parametrize('every', [0, 1.5, -1, 'x'])
def test_bad_interval(every):
    with pytest.raises(ValueError, match='every must be a whole number of epochs, 1 or more'): CheckpointCallback(every=every)

def test_only_training_reads_and_writes(tmp_path):
    "A callback that stays with the learner leaves validation, prediction and lr_find alone"
    learn = fresh(tmp_path, cbs=[CheckpointCallback('run')])
    learn.fit(2)
    file = learn.checkpoint.file
    when,before = file.stat().st_mtime_ns,everything(learn)
    other = fresh(tmp_path, seed=5, cbs=[CheckpointCallback('run')])
    weights = snapshot(other.model)
    other.validate(); other.get_preds()
    other.lr_find(num_it=5, show_plot=False)
    assert not changed(weights, snapshot(other.model)) and file.stat().st_mtime_ns==when and not changed(before, everything(learn))

def test_chance_is_left_alone_without_a_seed(tmp_path):
    torch.manual_seed(3)
    learn = fresh(tmp_path)
    torch.manual_seed(5)
    learn.fit(1, cbs=CheckpointCallback('run', seed=None))
    other = fresh(tmp_path/'b')
    torch.manual_seed(6)
    other.fit(1, cbs=CheckpointCallback('run', seed=None))
    assert changed(snapshot(learn.model), snapshot(other.model))

def test_the_file_holds_no_code(tmp_path):
    one_cycle(learn := fresh(tmp_path, opt=wrapped(TORCH_OPTS['adamw'])))
    state = torch.load(tmp_path/'models'/'run.pth', weights_only=True)
    assert state['epoch']==EPOCHS and torch.equal(state['model']['0.weight_mask'], learn.model[0].weight_mask)

GO_ON = '''
import sys, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
for name,k in [a.split(':') for a in sys.argv[3:]]: FITS[name](learn := made(name, f'{sys.argv[2]}/{name}', seed=9), start_epoch=int(k)); torch.save(everything(learn), f'{sys.argv[2]}/{name}/end')
'''
FITS = {n: lambda l, *cbs, **kw: l.fit_one_cycle(EPOCHS, 1e-2, cbs=[CheckpointCallback('run'), *cbs], **kw) for n in CATALOGUE}
FITS['flat_cos'] = lambda l, *cbs, **kw: l.fit_flat_cos(EPOCHS, 1e-2, cbs=[CheckpointCallback('run'), *cbs], **kw)
FITS['trackers'] = lambda l, *cbs, **kw: l.fit(EPOCHS, .05, cbs=[SaveModelCallback(fname='best'), CheckpointCallback('run'), *cbs], **kw)
def made(name, tmp, seed=0): return fresh(tmp, name if name in CATALOGUE else 'SET', seed=seed)

@pytest.mark.filterwarnings('ignore')
def test_in_a_new_process_with_start_epoch(tmp_path):
    "Each preset, fit_flat_cos and SaveModelCallback: stopped in an epoch, gone on with in another process by `start_epoch`"
    wholes,told = {},[]
    for i,(name,fit) in enumerate(FITS.items()):
        fit(whole := made(name, tmp_path/'whole'/name))
        wholes[name],k = everything(whole),1+i%(EPOCHS-1)
        with pytest.raises(Stop): fit(made(name, tmp_path/name), PowerCut(k, i%N_ITER))
        told.append(f'{name}:{k}')
    p = subprocess.run([sys.executable, '-c', GO_ON, os.path.dirname(__file__), str(tmp_path), *told], capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    assert {n: changed(whole, torch.load(tmp_path/n/'end')) for n,whole in wholes.items()}=={n: [] for n in FITS}

# ------------------------------------------------------------ a file that is always whole
@pytest.mark.parametrize('when', ['half written', 'written'])
def test_killed_in_the_middle_of_writing(when, tmp_path):
    "SIGKILL when half of the bytes are out, and just before the new file takes its place"
    code = '''
import os, signal, sys, torch
from sparsefast.checkpoint import atomic_save
atomic_save(dict(a=torch.ones(1000)), sys.argv[1])
def dies(*args): os.kill(os.getpid(), signal.SIGKILL)
def half(obj, path):
    with open(path, 'wb') as f: f.write(b'x'*2000); f.flush(); dies()
if sys.argv[2]=='half written': torch.save = half
else: os.replace = dies
atomic_save(dict(a=torch.zeros(1000)), sys.argv[1])
'''
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path/'f'), when])
    assert p.returncode==-signal.SIGKILL and torch.equal(torch.load(tmp_path/'f')['a'], torch.ones(1000)) and len(list(tmp_path.iterdir()))==2
    atomic_save(dict(a=2), tmp_path/'f')                                                      # what was left lying about is in nobody's way
    assert torch.load(tmp_path/'f')==dict(a=2) and len(list(tmp_path.iterdir()))==1

def test_a_failed_write_leaves_the_old_file(tmp_path):
    atomic_save(dict(a=1), tmp_path/'f')
    with pytest.raises(Exception): atomic_save(dict(a=lambda: 0), tmp_path/'f')
    assert torch.load(tmp_path/'f')==dict(a=1)

# ------------------------------------------------------------ a damaged file
def cut_off(b, n): return b[:n]
def flipped(b, *at):
    b = bytearray(b)
    for i in at: b[i] ^= 0x10
    return bytes(b)
def blank(b, at, n=64): return b[:at]+bytes(n)+b[at+n:]
def directories(b): return [i+38 for i in range(len(b)) if b[i:i+4]==b'PK\1\2']             # where the archive says that a record is a folder, which torch reads as anything

def damages(b):
    "Copies of a file, each damaged"
    n,g = len(b),random.Random(0)
    yield from (cut_off(b, k) for k in (0, 1, n//3, n-100, n-1))
    yield from (flipped(b, g.randrange(n)) for _ in range(24))
    yield from (flipped(b, *(g.randrange(n) for _ in range(4))) for _ in range(8))
    yield from (blank(b, g.randrange(n-64)) for _ in range(8))
    yield from (flipped(b, at) for at in directories(b)[4:8])
    yield from (b'', b'x'*n, b[:n//2]+b[:n//2], b[n//2:])

def test_a_damaged_file_is_refused_by_name(tmp_path):
    "Before anything of the learner has changed; or the damage is where it does not matter"
    with pytest.raises(Stop): one_cycle(fresh(tmp_path, 'RigL'), PowerCut(3))
    file = tmp_path/'models'/'run.pth'
    whole,state,refused = file.read_bytes(),torch.load(file),0
    same = lambda a, b: changed({k: v for k,v in a['model'].items()}, b['model'])==[] and str(a['opt'])==str(b['opt']) and a['callbacks']==b['callbacks']
    for bad in damages(whole):
        file.write_bytes(bad)
        learn = fresh(tmp_path, 'RigL', seed=3)
        before = snapshot(learn.model)
        try: assert same(load_checkpoint(file), state)
        except ValueError as e:
            refused += 1
            assert 'run.pth must be a whole checkpoint' in str(e) and 'rename run.previous.pth, which is whole and has 2 epochs, to run.pth' in str(e)
            if refused%6==0:
                with pytest.raises(ValueError, match='run.pth must be a whole checkpoint'): one_cycle(learn)
                assert not changed(before, snapshot(learn.model)) and not learn.opt.state_dict()['state'][0].get('grad_avg', torch.zeros(1)).any()
    assert refused>30

def test_the_file_before_it_leads_to_the_same_end(tmp_path):
    one_cycle(whole := fresh(tmp_path/'a'))
    with pytest.raises(Stop): one_cycle(fresh(tmp_path/'b'), PowerCut(3))
    file,old = (tmp_path/'b'/'models'/f'{n}.pth' for n in ('run', 'run.previous'))
    assert torch.load(file)['epoch']==3 and torch.load(old)['epoch']==2
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match='rename run.previous.pth'): one_cycle(fresh(tmp_path/'b'))
    os.replace(old, file)
    one_cycle(learn := fresh(tmp_path/'b', seed=5))
    assert not changed(everything(whole), everything(learn))
    file.write_bytes(b'x')
    old.write_bytes(b'x')
    with pytest.raises(ValueError, match='use another name, or resume=False'): one_cycle(fresh(tmp_path/'b'))
    fresh(tmp_path/'b').fit(1, cbs=CheckpointCallback('run', resume=False))
    assert torch.load(file)['epoch']==1 and torch.load(old)['epoch']==0                       # not one of another training

def test_another_file_or_learner_is_refused_by_name(tmp_path):
    one_cycle(learn := fresh(tmp_path, cbs=[]))
    learn.save('other')
    with pytest.raises(ValueError, match='other.pth must be a whole checkpoint.*did not write it'): learn.fit(1, cbs=CheckpointCallback('other'))
    groups = fresh(tmp_path, seed=2, splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    torch_opt,wide = fresh(tmp_path, seed=2, opt=wrapped(TORCH_OPTS['adamw'])),fresh(tmp_path, seed=2)
    wide.model[0] = nn.Linear(9,24)
    for other in (groups, torch_opt, wide):
        before = snapshot(other.model)
        with pytest.raises(ValueError, match='run.pth does not fit this learner: use another name, or resume=False'): one_cycle(other)
        assert not changed(before, snapshot(other.model))

def test_files_of_earlier_versions_load(tmp_path):
    "They do not tell steps, random numbers or where gradients wait, and have no checksum"
    one_cycle(whole := fresh(tmp_path/'a'))
    with pytest.raises(Stop): one_cycle(fresh(tmp_path/'b'), PowerCut(3))
    file = tmp_path/'b'/'models'/'run.pth'
    state = torch.load(file)
    del state['random'], state['callbacks']
    torch.save({**state, 'half_done': None}, file)
    one_cycle(learn := fresh(tmp_path/'b', seed=5))
    assert not changed(everything(whole), everything(learn))

def test_an_error_leaves_nothing_behind(tmp_path):
    "A resumed training that fails again; then others in the same learner, which train all their epochs"
    with pytest.raises(Stop): one_cycle(fresh(tmp_path), PowerCut(2))
    with pytest.raises(Stop): one_cycle(learn := fresh(tmp_path), PowerCut(3))
    seen = []
    for cbs in ([], [CheckpointCallback('other')]):
        learn.fit(2, cbs=[*cbs, Watch('after_epoch', lambda l: seen.append(l.train_iter))])
    assert seen==[N_ITER, 2*N_ITER]*2

SCRIPT = '''
import sys, warnings; warnings.filterwarnings('ignore')
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
learn = fresh(sys.argv[2], seed=int(sys.argv[3]))
print('ready', flush=True)
learn.fit_one_cycle(60, 1e-2, cbs=CheckpointCallback('run'))
torch.save(learn.model.state_dict(), sys.argv[2]+'/done')
'''
def test_killed_while_saving(tmp_path):
    "Killed by SIGKILL at moments of no choice, again and again, in new processes: the file is whole each time, and the end is the same"
    whole,file = fresh(tmp_path/'a'),tmp_path/'b'/'models'/'run.pth'
    whole.fit_one_cycle(60, 1e-2, cbs=CheckpointCallback('run'))
    epochs = []
    for i in range(8):
        p = subprocess.Popen([sys.executable, '-c', SCRIPT, os.path.dirname(__file__), str(tmp_path/'b'), str(i)], stdout=subprocess.PIPE, text=True)
        p.stdout.readline()
        if i<3:
            was = epochs[-1] if epochs else 0
            while p.poll() is None and (not file.exists() or torch.load(file)['epoch']<was+4): pass
            p.send_signal(signal.SIGKILL)
        p.wait()
        epochs.append(torch.load(file)['epoch'])
        if (tmp_path/'b'/'done').exists(): break
    assert sum(e<60 for e in epochs)>=2 and epochs==sorted(epochs)
    assert not changed(snapshot(whole.model), {f'model.{k}': v for k,v in torch.load(tmp_path/'b'/'done').items()})
