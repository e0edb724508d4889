"Beside what people use with fastai: exact after every step, and the same as without where it should be"
import copy, io, pickle, random, shutil, warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai import optimizer as fo
from fastai.callback import fp16, schedule, training
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat
from sparsefast.all import *
from sparsefast.methods import DSTMethod
from sparsefast.optim import slow_weights
from helpers import *

def dst(preset='RigL', **kw): return DynamicSparseTrainingCallback(**{**PRESETS[preset], 'batches_per_update': 8, **kw})

class Exact(Callback):
    "After every optimizer step: as many active weights as at the start, masked ones zero, and their state too where that is promised"
    order,run_valid = 100,False
    def __init__(self, state=True): self.state,self.steps = state,0
    def before_fit(self): self.n = sum(nnz(self.learn.model))
    def after_step(self):
        self.steps += 1
        assert sum(nnz(self.learn.model))==self.n and masked_are_zero(self.learn.model)
        if self.state: assert all((t[~mask]==0).all() for p,mask,_ in sparse_params(self.learn.model) for t in [*opt_tensors(self.learn.opt, p).values(), *slow_weights(self.learn.opt, p)])

def trained(learn, n=4, fit=None, state=True, **kw):
    before,exact = masks(learn.model),Exact(state)
    (fit or (lambda l: l.fit(n, **kw)))(learn.add_cb(exact))
    assert exact.steps and not same_masks(before, masks(learn.model))
    return exact.steps

# ------------------------------------------------------------ callbacks, alone and together
COMPANIONS = dict(accumulate=lambda: [GradientAccumulation(16)], clip=lambda: [GradientClip(.1)], mixup=lambda: [MixUp()], schedule=lambda: [ParamScheduler(dict(lr=SchedCos(.1, .01), mom=SchedCos(.9, .8)))],
                  early=lambda: [EarlyStoppingCallback(patience=2)], save=lambda: [SaveModelCallback(fname='best')], plateau=lambda: [ReduceLROnPlateau(patience=1)], csv=lambda: [CSVLogger()],
                  together=lambda: [GradientAccumulation(16), GradientClip(.1), MixUp(), SaveModelCallback(fname='best'), CSVLogger()])

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('name', COMPANIONS)
@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16'])
def test_companion(name, preset, precision, cpu_amp, tmp_path):
    if precision!='fp32' and name in ('csv', 'plateau', 'early', 'schedule'): return
    learn = learner(opt_func=partial(fo.SGD, mom=.9, wd=.01), cbs=[dst(preset), *COMPANIONS[name]()], tmp=tmp_path, n_iter=16)
    learn.loss_func = CrossEntropyLossFlat()
    if precision!='fp32': learn = getattr(learn, f'to_{precision}')()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        steps = trained(learn, 4, state=preset!='SNFS')
    assert steps==(32 if name in ('accumulate', 'together') else 64) or name=='early'
    assert masked_are_zero(learn.model) and sum(nnz(learn.model))==sum(nnz(sparse_mlp()))
    if name=='csv': assert len((tmp_path/'history.csv').read_text().splitlines())==5

def fixed(preset, *cbs, **kw):
    learn = learner(opt_func=partial(fo.SGD, mom=.9, wd=.01), cbs=[dst(preset), *cbs], **kw)
    learn.fit(4)
    return snapshot(learn.model, learn.opt)

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('cb', [lambda: GradientClip(1e9), lambda: CSVLogger(fname='c.csv'), lambda: EarlyStoppingCallback(patience=99), lambda: GradientAccumulation(8)], ids=['clip', 'csv', 'early', 'accumulate'])
def test_what_does_nothing_changes_nothing(cb, preset, tmp_path):
    a,b = fixed(preset),fixed(preset, cb(), tmp=tmp_path)
    assert not changed(a, b)

def test_save_model_brings_back_the_masks_that_belong(tmp_path):
    "The best epoch's masks, not the last one's"
    saved = {}
    learn = learner(opt_func=partial(fo.SGD, mom=.9), cbs=[dst('SET'), SaveModelCallback(fname='best')], tmp=tmp_path)
    class Look(Callback):
        order = 61.5
        def after_epoch(self):
            if self.save_model.new_best: saved.update(snapshot(self.learn.model))
    learn.add_cb(Look())
    seen = iter([.5, .2, .9, .8, .7])                                                         # the second epoch is best
    learn.recorder.loss = type('Fake', (), dict(name='valid_loss', reset=lambda s: None, accumulate=lambda s, l: None, value=property(lambda s: torch.tensor(next(seen)))))()
    learn.fit(5)
    assert not changed(saved, snapshot(learn.model)) and masked_are_zero(learn.model)

def test_show_training_loop(capsys):
    learn = learner(cbs=[dst(), GradientClip(.1)]).to_fp16()
    learn.show_training_loop()
    out = capsys.readouterr().out
    step = out[out.index('Start Epoch Loop'):].split('- before_step')[1].split('\n')[0]
    assert step.index('MixedPrecision')<step.index('DynamicSparseTrainingCallback')<step.index('GradientClip')

# ------------------------------------------------------------ lr_find
def test_lr_find_leaves_all_as_it_was_and_suggests():
    "Weights, masks and optimizer afterwards as before, and a rate at which the sparse model learns"
    learn = learner(opt_func=partial(fo.SGD, mom=.9), cbs=dst('SET'), n_iter=40)
    learn.fit(1)
    before = snapshot(learn.model, learn.opt)
    found = learn.lr_find(num_it=60, show_plot=False)
    assert not changed(before, snapshot(learn.model, learn.opt)) and 1e-5<found.valley<1
    first = learn.validate()[0]
    learn.fit(4, lr=found.valley)
    assert learn.validate()[0]<first

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('num_it', [7, 25], ids=['within an epoch', 'over several'])
def test_a_run_after_lr_find_is_the_run_without(num_it, preset):
    "Shuffled batches and dropout: chance is where it was, in torch, numpy, Python and the data loader"
    def run(look):
        torch.manual_seed(0); random.seed(0)
        model = nn.Sequential(nn.Linear(8,24), nn.Dropout(.3), nn.ReLU(), nn.Linear(24,3))
        sparsify_model(model, .5)
        x,y = map(torch.cat, zip(*batches(10)))
        train,valid = (DataLoader(TensorDataset(x, y), bs=8, shuffle=s, num_workers=0) for s in (True, False))
        learn = Learner(DataLoaders(train, valid, device='cpu'), model, loss_func=nn.CrossEntropyLoss(), opt_func=partial(fo.SGD, mom=.9), lr=.05, cbs=dst(preset), path=TMP.name)
        learn.logger = noop
        learn.remove_cb(ProgressCallback)
        if look: learn.lr_find(num_it=num_it, show_plot=False)
        learn.fit(3)
        return snapshot(model, learn.opt), torch.get_rng_state(), random.getstate(), train.rng.getstate()
    a,b = run(False),run(True)
    assert not changed(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2:]==b[2:]

# ------------------------------------------------------------ fits
FITS = dict(one_cycle=lambda l: l.fit_one_cycle(4, .05), flat_cos=lambda l: l.fit_flat_cos(4, .05), sgdr=lambda l: l.fit_sgdr(2, 1, .05), discriminative=lambda l: l.fit_one_cycle(4, slice(1e-3, 1e-1)))
@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('fit', FITS)
def test_fits(fit, preset):
    learn = learner(opt_func=partial(fo.Adam, wd=.01), cbs=dst(preset), splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    trained(learn, fit=FITS[fit], state=preset!='SNFS')

@pytest.mark.parametrize('preset', PRESETS)
def test_freeze_and_thaw(preset):
    "Frozen: bit for bit, masks and weights; thawed: they join in; frozen again: they stand still again, whatever the weight decay"
    learn = learner(opt_func=partial(fo.SGD, mom=.9, wd=.1), cbs=dst(preset, batches_per_update=4, replaces_step=False), splitter=lambda m: [list(m[:2].parameters()), list(m[2:4].parameters()), list(m[4:].parameters())])
    def moved(n, what):
        before = snapshot(learn.model)
        what(); learn.fit(2)
        names = changed(before, snapshot(learn.model))
        assert masked_are_zero(learn.model)
        return {i: any(k.startswith(f'model.{i}.') for k in names) for i in (0, 2, 4)}, [k for k in names if k.endswith('mask')]
    assert moved(2, lambda: learn.freeze())[0]=={0: False, 2: False, 4: True}
    assert moved(2, lambda: learn.freeze_to(1))[0]=={0: False, 2: True, 4: True}
    everything,kinds = moved(2, learn.unfreeze)
    assert everything=={0: True, 2: True, 4: True} and 'model.0.weight_mask' in kinds
    assert moved(2, lambda: learn.freeze_to(-1))[0]=={0: False, 2: False, 4: True}

def test_a_dense_layer_frozen_again_stands_still_too():
    "fastai goes on decaying what has a gradient from before, with a mask or without"
    model = mlp(8, 24, 20, 3)
    sparsify_model(model, .6, exclude=0)
    learn = learner(model, opt_func=partial(fo.SGD, mom=.9, wd=.1), cbs=dst('SET'), splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.fit(2)
    learn.freeze()
    before = snapshot(model)
    learn.fit(2)
    names = changed(before, snapshot(model))
    assert not [k for k in names if k.startswith('model.0.')] and 'model.2.weight' in names

# ------------------------------------------------------------ optimizers
FASTAI = dict(radam=fo.RAdam, qhadam=fo.QHAdam, larc=partial(fo.Larc, mom=.9), lamb=fo.Lamb, ranger=fo.ranger, lookahead_sgd=lambda ps, **kw: fo.Lookahead(fo.SGD(ps, mom=.9, **kw)))
TORCH = dict(nesterov=TORCH_OPTS['nesterov'], adamw=TORCH_OPTS['adamw'], adagrad=TORCH_OPTS['adagrad'], adam_fused=partial(torch.optim.Adam, lr=1e-2, fused=True), adamw_fused=partial(torch.optim.AdamW, lr=1e-2, fused=True),
             sgd_fused=partial(torch.optim.SGD, lr=.05, momentum=.9, fused=True), sgd_foreach=partial(torch.optim.SGD, lr=.05, momentum=.9, foreach=True), adamw_foreach=partial(torch.optim.AdamW, lr=1e-2, foreach=True),
             rmsprop_foreach=partial(torch.optim.RMSprop, lr=1e-3, foreach=True), adagrad_fused=partial(torch.optim.Adagrad, lr=1e-2, fused=True), nadam=partial(torch.optim.NAdam, lr=1e-2), adamax=partial(torch.optim.Adamax, lr=1e-2))
NO_MOMENTUM = ('adagrad', 'adagrad_fused', 'rmsprop_foreach')

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', FASTAI)
def test_fastai_optimizers(opt, preset): trained(learner(opt_func=FASTAI[opt], cbs=dst(preset)), state=preset!='SNFS', lr=1e-2)

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', TORCH)
def test_torch_optimizers(opt, preset):
    "In a plain loop and under OptimWrapper: exact, and the same run"
    if preset=='SNFS' and opt in NO_MOMENTUM:
        with pytest.raises(ValueError, match='keeps none'): plain_loop(m := sparse_mlp(), TORCH[opt](m.parameters()), DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8}), 8)
        return
    model,before = sparse_mlp(),nnz(sparse_mlp())
    o,m = TORCH[opt](model.parameters()),DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8})
    def exact(step):
        assert sum(nnz(model))==sum(before) and masked_are_zero(model)
        eps = 1e-8 if opt=='adamax' else 0.                                                   # which Adamax adds to its maximum
        if preset!='SNFS': assert all((t[~mask].abs()<=eps).all() for p,mask,_ in sparse_params(model) for t in opt_tensors(o, p).values())
    for step,(x,y) in enumerate(batches(10)*4, 1):
        backward(model, x, y)
        m.step(model, o, step, (step-1)/40)
        exact(step)
    learn = learner(opt_func=wrapped(TORCH[opt]), cbs=dst(preset))
    trained(learn, state=preset!='SNFS' and opt!='adamax', lr=TORCH[opt].keywords['lr'])
    assert not changed(snapshot(learn.model), snapshot(model))

@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon')
@pytest.mark.parametrize('preset', PRESETS)
def test_muon(preset):
    "For matrices; all else by another optimizer. Its steps are dense, and masked all the same; under OptimWrapper too, where it trains as in the plain loop"
    def bare(): return nn.Sequential(*[nn.Linear(i, o, bias=False) if k%2==0 else nn.ReLU() for k,(i,o) in enumerate([(8,24), (0,0), (24,20), (0,0), (20,3)])])
    def made():
        torch.manual_seed(0)
        sparsify_model(model := bare(), .5)
        return model
    model = made()
    before,first = sum(nnz(model)),masks(model)
    def exact(step): assert sum(nnz(model))==before and masked_are_zero(model)
    muon = partial(torch.optim.Muon, lr=1e-2)
    o,m = muon(model.parameters()),DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8})
    for step,(x,y) in enumerate(batches(10)*4, 1):
        backward(model, x, y)
        m.step(model, o, step, (step-1)/40)
        exact(step)
    assert not same_masks(first, masks(model))
    learn = learner(model=made(), opt_func=wrapped(muon), cbs=dst(preset))
    trained(learn, state=False, lr=1e-2)
    assert not changed(snapshot(learn.model), snapshot(model))

# ------------------------------------------------------------ copies and files
def test_copies_train_on_their_own():
    model = sparse_mlp()
    twin,thawed = copy.deepcopy(model),pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO(); torch.save(model.state_dict(), buffer); buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = mlp(8,24,20,3)
    load_sparse_state(fresh, state)
    start = snapshot(model)
    for m in (twin, thawed, fresh): assert not changed(start, snapshot(m))
    for m in (twin, thawed, fresh): plain_loop(m, torch.optim.SGD(m.parameters(), lr=.05, momentum=.9), DSTMethod(**{**RigL_presets, 'batches_per_update': 8}))
    assert not changed(start, snapshot(model)) and not changed(snapshot(twin), snapshot(thawed)) and not changed(snapshot(twin), snapshot(fresh))
    for m in (twin, thawed, fresh):
        m[0].weight.data.fill_(1.)
        m(torch.randn(2, 8))
        assert masked_are_zero(m)

def test_moving_average_of_weights():
    "torch's averaged model copies buffers, so it has the newest masks"
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    model = sparse_mlp()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(.9))
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.05), DSTMethod(**Static_presets), 10, lambda s: ema.update_parameters(model))
    assert masked_are_zero(ema) and sum(nnz(ema))==sum(nnz(model))
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.05), DSTMethod(**{**SET_presets, 'batches_per_update': 3}), 10, lambda s: ema.update_parameters(model))
    assert same_masks(masks(ema), masks(model)) and not masked_are_zero(ema)                  # what was active lately is in the average still,
    ema(torch.randn(2, 8))
    assert masked_are_zero(ema)                                                               # until the copy's own hooks see to it

def test_channels_last():
    def run(fmt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)).double().to(memory_format=fmt)
        sparsify_model(model, .7)
        opt,m = torch.optim.SGD(model.parameters(), lr=.02, momentum=.9),DSTMethod(**{**RigL_presets, 'batches_per_update': 5, 'replaces_step': False})
        gen = torch.Generator().manual_seed(0)
        for step in range(1, 21):
            F.cross_entropy(model(torch.randn(4, 3, 8, 8, generator=gen).double().to(memory_format=fmt)), torch.randint(3, (4,), generator=gen)).backward()
            m.step(model, opt, step, (step-1)/20); opt.zero_grad()
            assert masked_are_zero(model)
        return model
    a,b = run(torch.contiguous_format),run(torch.channels_last)
    assert same_masks(masks(a), masks(b)) and all(torch.allclose(p, q, atol=1e-9) for p,q in zip(a.parameters(), b.parameters()))
    assert b[3].weight.is_contiguous(memory_format=torch.channels_last)

# ------------------------------------------------------------ torch.compile
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a compiler'))])
def test_compile(backend):
    "One graph, hooks included, and none anew when masks change; the same masks as without"
    import torch._dynamo as dynamo
    dynamo.reset(); dynamo.utils.counters.clear()
    plain,model = sparse_mlp(),sparse_mlp()
    compiled = torch.compile(model, backend=backend)
    m = DSTMethod(**{**RigL_presets, 'batches_per_update': 11})
    for net,call in ((plain, plain), (model, compiled)):
        opt = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
        for step,(x,y) in enumerate(batches(45), 1):
            F.cross_entropy(call(x), y).backward()
            m.step(net, opt, step, (step-1)/45)
            opt.zero_grad()
    assert dynamo.utils.counters['stats']['unique_graphs']==1 and not dynamo.utils.counters['graph_break']
    assert same_masks(masks(plain), masks(model)) and not same_masks(masks(model), masks(sparse_mlp())) and all(torch.allclose(p, q, atol=1e-5) for p,q in zip(plain.parameters(), model.parameters()))
    model[0].weight.data.fill_(1.)
    with torch.no_grad(): compiled(batches(1)[0][0])
    assert masked_are_zero(model)
