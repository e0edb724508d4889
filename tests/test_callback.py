"The callback: the same engine in a `Learner`, and fastai's companions"
import copy, warnings
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai import optimizer as fo
from fastai.callback import fp16, schedule, training                                     # patch `Learner` with lr_find, fine_tune, to_fp16
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, load_learner
from helpers import *
from sparsefast.attach import attach
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.masks import masked_params, sparse_params
from sparsefast.methods import DSTMethod
from sparsefast import presets
from sparsefast.presets import Static_presets
from sparsefast.optim import *
from sparsefast.scores import *
from sparsefast.storage import to_sparse_layers

DST = DynamicSparseTrainingCallback
def dst(preset='RigL', **kwargs): return DST(**{**PRESETS[preset], 'batches_per_update': 8, **kwargs})

FASTAI_OPTS = dict(sgd=partial(fo.SGD, wd=.01), momentum=partial(fo.SGD, mom=.9, wd=.01),
                   l2=partial(fo.SGD, mom=.9, wd=.01, decouple_wd=False), adam=partial(fo.Adam, wd=.01),
                   rmsprop=partial(fo.RMSProp, mom=.9, wd=.01), lamb=partial(fo.Lamb, wd=.01))
WRAPPED = {f'torch_{k}': wrapped(f) for k,f in TORCH_OPTS.items() if k in ('momentum','nesterov','adamw')}
OPTS = FASTAI_OPTS | WRAPPED
COMBOS = [pytest.param(p, o, id=f'{p}-{o}') for p in PRESETS for o in OPTS if not (p=='SNFS' and o=='sgd')]

def update_steps(log):
    "Where a log of snapshots, one for each step, shows an update: masks moved, or nothing else did"
    moved = [(s, changed(a, b)) for s,(a,b) in enumerate(zip(log, log[1:]), 2)]
    return [s for s,names in moved if any(n.endswith('_mask') for n in names) or not any('bias' in n for n in names)]
def expected_updates(preset): return [8,16,24] if preset=='RigL' else [8,16,24,32]       # of 40 steps

def watch(learn, f, event='after_step', order=100): return learn.add_cb(Watch(event, f, order))

# ------------------------------------------------------------ the same run as a plain loop
@pytest.mark.parametrize('preset,opt', COMBOS)
def test_equals_the_plain_loop(preset, opt, n_epoch=5):
    learn,twin = (learner(opt_func=OPTS[opt]) for _ in range(2))
    start = masks(learn.model)
    learn.fit(n_epoch, lr=.01, cbs=dst(preset))
    twin.create_opt()
    twin.opt.set_hypers(lr=.01)
    method,step,total = DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8}),0,n_epoch*len(twin.dls.train)
    for _ in range(n_epoch):
        for x,y in twin.dls.train:
            step += 1
            F.cross_entropy(twin.model(x), y).backward()
            method.step(twin.model, twin.opt, step, (step-1)/total)
            twin.opt.zero_grad()
    assert not changed(snapshot(learn.model, learn.opt), snapshot(twin.model, twin.opt)) and not same_masks(start, masks(learn.model))

@pytest.mark.parametrize('preset,opt', COMBOS)
def test_exact_after_every_step(preset, opt):
    learn,log = learner(opt_func=OPTS[opt], cbs=dst(preset)),[]
    for m in learn.model.modules(): m._forward_pre_hooks.clear()
    before,start = nnz(learn.model),masks(learn.model)
    def check(learn):
        assert masked_are_zero(learn.model)
        assert sum(nnz(learn.model))==sum(before) and (preset=='SNFS' or nnz(learn.model)==before)
        log.append(snapshot(learn.model))
    watch(learn, check)
    learn.fit(4, lr=.01)
    assert len(log)==40 and masked_are_zero(learn.model) and update_steps(log)==expected_updates(preset) and not same_masks(start, masks(learn.model))

@pytest.mark.parametrize('preset', PRESETS)
def test_once_per_epoch_by_default(preset, n_iter=12):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)                                      # less than a tenth of the steps
        learn,log = learner(opt_func=FASTAI_OPTS['momentum'], n_iter=n_iter, cbs=DST(**{**PRESETS[preset], 'batches_per_update': None})),[]
        watch(learn, lambda l: log.append(snapshot(l.model)))
        learn.fit(4)
    assert update_steps(log)==[12,24,36]                                                 # the end of the last epoch is the last step of all

def test_defaults_are_rigl_once_per_epoch():
    m = DST().method
    assert m==DSTMethod() and (m.keep_score_f,m.grow_score_f)==(weight_magnitude,gradient_magnitude)
    assert (m.batches_per_update,m.initial_drop_grow_pct,m.stop_pct,m.replaces_step)==(None,.3,.75,True)

@pytest.mark.parametrize('key,value', [('batches_per_update',50), ('initial_drop_grow_pct',.1), ('stop_pct',.5), ('seed',7), ('keep_score_f',random_score),
                                       ('grow_score_f',random_score), ('final_drop_grow_pct',.01), ('replaces_step',False)])
@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_overridden_one_key_at_a_time(preset, key, value):
    plain,m = DSTMethod(**PRESETS[preset]),DST(**{**PRESETS[preset], key: value}).method
    assert {k for k in vars(m) if getattr(m, k)!=getattr(plain, k)} <= {key} and getattr(m, key)==value

def test_only_the_given_modules_are_rewired():
    learn = learner()
    start = masks(learn.model)
    learn.fit(4, cbs=dst(sparse_modules=[learn.model[2]]))
    now = masks(learn.model)
    assert torch.equal(now[0], start[0]) and not torch.equal(now[1], start[1]) and torch.equal(now[2], start[2])

def test_static_training():
    learn = learner(opt_func=FASTAI_OPTS['adam'], cbs=DST(**Static_presets))
    start,w = masks(learn.model),learn.model[0].weight.detach().clone()
    watch(learn, lambda l: masked_are_zero(l.model) or pytest.fail('revived'))
    learn.fit(3)
    assert same_masks(start, masks(learn.model)) and not torch.equal(w, learn.model[0].weight)

def test_sugar():
    learn = learner(mlp(8,6,3))
    assert learn.sparsify(.5) is learn and nnz(learn.model)==[24,9]
    assert learn.unsparsify() is learn and nnz(learn.model)==[]

# ------------------------------------------------------------ what is not training moves no mask
VERBS = {'validate': Learner.validate, 'get_preds': Learner.get_preds, 'get_preds train': partial(Learner.get_preds, ds_idx=0),
         'lr_find': partial(Learner.lr_find, num_it=20, show_plot=False)}
@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('trained', [False,True], ids=['fresh','trained'])
@pytest.mark.parametrize('verb', VERBS.values(), ids=VERBS)
def test_moves_no_mask(verb, trained, preset):
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst(preset, batches_per_update=2 if preset!='RigL' else 8))
    if trained: learn.fit(2)
    before,seen = snapshot(learn.model),[]
    watch(learn, lambda l: seen.append((masks(l.model), masked_are_zero(l.model))))
    verb(learn)
    assert not changed(before, snapshot(learn.model))
    assert all(ok and same_masks(m, [before[f'model.{i}.weight_mask'] for i in (0,2,4)]) for m,ok in seen)
    learn.fit(3)                                                                         # and training goes on rewiring
    assert not same_masks(masks(learn.model), [before[f'model.{i}.weight_mask'] for i in (0,2,4)])

def test_lr_find_leaves_the_optimizer_as_it_was():
    learn = learner(opt_func=FASTAI_OPTS['adam'], cbs=dst())
    learn.fit(2)
    before = snapshot(learn.model, learn.opt)
    learn.lr_find(num_it=20, show_plot=False)
    assert not changed(before, snapshot(learn.model, learn.opt))

def test_validate_between_fits_changes_nothing():
    runs = []
    for peek in (False,True):
        learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst())
        learn.fit(2)
        if peek: learn.validate(); learn.get_preds()
        learn.fit(3)
        runs.append(snapshot(learn.model, learn.opt))
    assert not changed(*runs)

# ------------------------------------------------------------ fits
def test_second_fit_goes_on_from_the_masks_of_the_first():
    learn,firsts = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst()),[]
    learn.fit(3)
    after = masks(learn.model)
    watch(learn, lambda l: firsts.append((l.dynamic_sparse_training.n_step, masks(l.model))))
    learn.fit(3)
    assert same_masks(firsts[0][1], after) and [s for s,_ in firsts]==list(range(1, 31)) and not same_masks(after, masks(learn.model))

@pytest.mark.parametrize('preset', PRESETS)
def test_two_fits_equal_two_plain_loops(preset):
    "The schedule belongs to one fit"
    learn,twin = (learner(opt_func=FASTAI_OPTS['momentum']) for _ in range(2))
    for n in (3,2): learn.fit(n, lr=.01, cbs=dst(preset))
    twin.create_opt()
    twin.opt.set_hypers(lr=.01)
    for n in (3,2):
        for step,(x,y) in enumerate([b for _ in range(n) for b in twin.dls.train], 1):
            F.cross_entropy(twin.model(x), y).backward()
            DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8}).step(twin.model, twin.opt, step, (step-1)/(10*n))
            twin.opt.zero_grad()
    assert not changed(snapshot(learn.model, learn.opt), snapshot(twin.model, twin.opt))

def test_start_epoch():
    "The last three epochs of six: steps 31 to 60, and the drop fraction of that time"
    learn,times = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst('SET')),[]
    watch(learn, lambda l: times.append((l.dynamic_sparse_training.n_step, l.dynamic_sparse_training._time()['pct'])))
    learn.fit(6, start_epoch=3)
    assert times==[(s, (s-1)/60) for s in range(31, 61)]

def test_cancelled_fit_leaves_masked_weights_zero():
    from fastai.callback.core import CancelFitException
    def stop(l):
        if l.train_iter==10: raise CancelFitException()
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst())
    for m in learn.model.modules(): m._forward_pre_hooks.clear()
    watch(learn, stop, 'after_batch')
    learn.fit(3)
    assert masked_are_zero(learn.model)
    learn.fit(1)

def test_before_fit_brings_everything_in_line():
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst())
    learn.fit(1)
    for m in learn.model.modules(): m._forward_pre_hooks.clear()
    with torch.no_grad():
        for _,_,p,mask in masked_params(learn.model):
            p[~mask] = 3.
            learn.opt.state[p]['grad_avg'][~mask] = 3.
    learn.validate()
    assert masked_are_zero(learn.model)
    assert all((learn.opt.state[p]['grad_avg'][~mask]==0).all() for _,_,p,mask in masked_params(learn.model))

# ------------------------------------------------------------ gradients
@pytest.mark.parametrize('preset', PRESETS)
def test_no_gradient_leaks_into_the_next_step(preset):
    learn,norms = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst(preset)),[]
    watch(learn, lambda l: norms.append(sum(float(p.grad.abs().sum()) for p in l.model.parameters() if p.grad is not None)), 'before_backward')
    learn.fit(4)
    assert norms==[0.]*40

def test_update_in_the_steps_place_moves_no_dense_parameter():
    learn,biases = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst()),[]
    watch(learn, lambda l: biases.append(l.model[0].bias.detach().clone()))
    learn.fit(4)
    still = [s for s,(a,b) in enumerate(zip(biases, biases[1:]), 2) if torch.equal(a, b)]
    assert still==[8,16,24]

@pytest.mark.parametrize('preset', PRESETS)
def test_clip_norm_sees_active_weights_only(preset, max_norm=1e-3):
    "Except where momentum has to stay dense (SNFS)"
    learn,norms = learner(opt_func=FASTAI_OPTS['momentum'], cbs=[dst(preset), training.GradientClip(max_norm)]),[]
    def norm(l):
        active = dict((id(p),mask) for *_,p,mask in masked_params(l.model))
        grads = [p.grad*active.get(id(p), 1.) if preset!='SNFS' else p.grad for p in l.model.parameters()]
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    watch(learn, norm, 'before_step', order=11.5)
    learn.fit(1)
    assert norms[:7]==pytest.approx([max_norm]*7, rel=1e-3)

@pytest.mark.filterwarnings('ignore:updates take the place')
def test_clipping_does_not_change_what_grows():
    runs = []
    for cbs in ([], [training.GradientClip(1e-6)]):
        learn = learner(opt_func=FASTAI_OPTS['sgd'], cbs=[dst(stop_pct=1.)]+cbs)
        watch(learn, lambda l: runs.append(masks(l.model)) if l.dynamic_sparse_training.n_step==8 else None)
        learn.fit(2, lr=0.)
    assert len(runs)==2 and same_masks(*runs)

def test_gradient_accumulation_counts_optimizer_steps():
    learn,log,times = learner(n_iter=60, cbs=[dst(), training.GradientAccumulation(n_acc=16)], opt_func=FASTAI_OPTS['momentum']),[],[]
    watch(learn, lambda l: (log.append(snapshot(l.model)), times.append((l.dynamic_sparse_training.n_step, l.dynamic_sparse_training._time()['pct']))))
    learn.fit(2)
    assert times==[(s, (s-1)/60) for s in range(1, 61)] and update_steps(log)==[8,16,24,32,40]

@pytest.mark.parametrize('n,bs,n_acc', [(64, 8, 16), (65, 8, 16), (33, 32, 32), (49, 16, 32), (65, 32, 64), (65, 8, 24)])
def test_accumulation_with_a_small_last_batch(n, bs, n_acc):
    "fastai counts examples, over the ends of epochs: the planned number of steps is the one that is taken, so a schedule of sparsity ends where it should"
    x,y = torch.randn(n, 8),torch.randint(3, (n,))
    dls = DataLoaders(*(DataLoader(TensorDataset(x, y), bs=bs, shuffle=False, drop_last=False, num_workers=0) for _ in range(2)), device=torch.get_default_device())
    learn = Learner(dls, mlp(8, 24, 20, 3), loss_func=nn.CrossEntropyLoss(), lr=.05, path=TMP.name)
    learn.logger = noop
    learn.remove_cb(ProgressCallback).sparsify(.8, preset='gmp')
    learn.fit(10, cbs=[training.GradientAccumulation(n_acc), cb := DynamicSparseTrainingCallback(presets.GMP(update_every=1))])
    assert cb.n_step==cb.n_total and sum(nnz(learn.model))==round(.2*n_params(learn.model))

def test_a_fit_that_stops_early_says_that_the_masks_are_not_yet_sparse():
    class Stop(Callback):
        def after_batch(self):
            if self.iter==5: raise CancelFitException()
    def fit(preset, *cbs):
        learn = learner(mlp(8, 24, 20, 3))
        learn.sparsify(.8, preset=preset)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            learn.fit(2, cbs=[DynamicSparseTrainingCallback(preset), *cbs])
        return [w for w in map(str, (c.message for c in caught)) if 'final sparsity' in w]
    told, = fit('gmp', Stop())
    assert 'after 6 of 20 optimizer steps' in told
    assert not fit('gmp') and not fit('rigl', Stop())

def test_accumulated_gradient_decides_what_grows():
    runs = []
    for bs,cbs in ((8, [training.GradientAccumulation(n_acc=16)]), (16, [])):
        learn = learner(opt_func=FASTAI_OPTS['momentum'], n_iter=256//bs, bs=bs, cbs=[dst()]+cbs)
        learn.fit(1)
        runs.append(learn.model)
    assert same_masks(*map(masks, runs)) and not same_masks(masks(runs[0]), masks(sparse_mlp()))
    for a,b in zip(*(m.parameters() for m in runs)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

# ------------------------------------------------------------ mixed precision, with a scaler that works on the CPU (`cpu_amp`)
@pytest.mark.parametrize('preset', PRESETS)
def test_fp16(preset, cpu_amp):
    learn,log = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst(preset)).to_fp16(init_scale=1024.),[]
    before = nnz(learn.model)
    def check(l):
        assert masked_are_zero(l.model) and sum(nnz(l.model))==sum(before)
        log.append(snapshot(l.model))
    watch(learn, check)
    watch(learn, lambda l: l.scaler.is_enabled() or pytest.fail('no scaler'), 'before_batch')
    learn.fit(4)
    assert update_steps(log)==expected_updates(preset)

def test_fp16_scale_does_not_matter(cpu_amp):
    "Gradients are unscaled where masks and scores see them"
    runs = []
    for scale in (64., 4096.):
        learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=[dst(), training.GradientClip(.1)]).to_fp16(init_scale=scale, growth_interval=10**6)
        seen = []
        watch(learn, lambda l: seen.append(l.model[0].weight.grad.abs().max().item()), 'before_step', order=10.6)
        learn.fit(1)
        runs.append(seen)
    assert runs[0]==pytest.approx(runs[1], rel=.05) and max(runs[0])<10

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('at', [3, 8, 9], ids=['ordinary','update','after an update'])
def test_fp16_overflow(preset, at, cpu_amp):
    "The step does not take place and is not counted; what was due comes with the next"
    learn,log = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst(preset)).to_fp16(init_scale=1024.),[]
    def overflow(l):
        if l.train_iter==at-1: l.model[0].weight.grad[0,0] = torch.inf
    watch(learn, overflow, 'after_backward')
    watch(learn, lambda l: log.append((l.dynamic_sparse_training.n_step, snapshot(l.model, l.opt))), order=100)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)                                      # the scaler's business
        learn.fit(2)
    steps = [s for s,_ in log]
    assert steps==[*range(1, at), *range(at-1, 20)] and not changed(log[at-2][1], log[at-1][1])
    moved = [s for (_,a),(s,b) in zip(log, log[1:]) if any(k.endswith('_mask') for k in changed(a, b))]
    assert moved==([8] if preset=='RigL' else [8,16]) and all(v.isfinite().all() for v in snapshot(learn.model, learn.opt).values())

def test_bf16(monkeypatch):
    monkeypatch.setattr(fp16, 'autocast', lambda _, **kw: torch.amp.autocast('cpu', **kw))
    learn = learner(opt_func=FASTAI_OPTS['adam'], cbs=dst()).to_bf16()
    start = masks(learn.model)
    learn.fit(3)
    assert masked_are_zero(learn.model) and not same_masks(start, masks(learn.model)) and nnz(learn.model)==[int(m.sum()) for m in start]

@pytest.mark.parametrize('preset', PRESETS)
def test_everything_together(preset, cpu_amp):
    cbs = [training.GradientClip(.1), training.GradientAccumulation(16), dst(preset)]
    learn = learner(n_iter=32, opt_func=FASTAI_OPTS['adam'], cbs=cbs).to_fp16(init_scale=256.)
    start = masks(learn.model)
    watch(learn, lambda l: masked_are_zero(l.model) or pytest.fail('revived'))
    learn.fit_one_cycle(3, 1e-2)
    assert not same_masks(start, masks(learn.model)) and sum(nnz(learn.model))==sum(int(m.sum()) for m in start)

def test_non_finite_gradient_without_a_scaler():
    learn,log = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst()),[]
    def bad(l):
        if l.train_iter==7: l.model[0].weight.grad[0,0] = torch.nan
    watch(learn, bad, 'after_backward')
    watch(learn, lambda l: log.append(snapshot(l.model, l.opt)))
    with pytest.warns(UserWarning, match='not finite at optimizer step 8'): learn.fit(4)
    assert not changed(log[6], log[7]) and changed(log[7], log[8]) and any(k.endswith('_mask') for k in changed(log[14], log[15]))

# ------------------------------------------------------------ freezing
def body_head(model): return [list(model[:3].parameters()), list(model[3:].parameters())]

@pytest.mark.parametrize('opt', OPTS)
def test_frozen_group_stays_bit_for_bit(opt):
    learn = learner(opt_func=OPTS[opt], cbs=dst('SET' if opt=='sgd' else 'SNFS'), splitter=body_head)
    learn.freeze()
    w,old = {k: v for k,v in snapshot(learn.model).items() if k[6] in '02'},masks(learn.model)
    learn.fit(4)
    assert not [k for k in changed(w, snapshot(learn.model)) if k in w] and not same_masks(old, masks(learn.model))

@pytest.mark.parametrize('opt', ['momentum','adam','torch_adamw'])
@pytest.mark.parametrize('preset', PRESETS)
def test_refrozen_group_stays_bit_for_bit(preset, opt):
    "After training, a frozen group still has gradients of zero, which weight decay would act upon"
    learn = learner(opt_func=OPTS[opt], cbs=dst(preset), splitter=body_head)
    learn.fit(2)
    learn.freeze()
    names = [f'model.{i}.weight{s}' for i in (0,2) for s in ('','_mask')]
    before = snapshot(learn.model)
    learn.fit(3)
    after = snapshot(learn.model)
    moved = changed(before, after)
    assert not [k for k in names if k in moved] and 'model.4.weight' in moved
    assert preset=='SNFS' or 'model.4.weight_mask' in moved                              # SNFS had filled that layer
    learn.unfreeze()
    learn.fit(4)
    assert not torch.equal(after['model.0.weight_mask'], masks(learn.model)[0]) and masked_are_zero(learn.model)

@pytest.mark.parametrize('preset', PRESETS)
def test_fine_tune(preset):
    learn = learner(opt_func=FASTAI_OPTS['adam'], splitter=body_head)
    before,start = nnz(learn.model),masks(learn.model)
    learn.fine_tune(3, 1e-2, freeze_epochs=2, cbs=dst(preset))
    assert sum(nnz(learn.model))==sum(before) and masked_are_zero(learn.model) and not any(torch.equal(a, b) for a,b in zip(start, masks(learn.model)))

# ------------------------------------------------------------ files
@pytest.mark.parametrize('opt', ['momentum','adam','torch_adamw'])
@pytest.mark.parametrize('preset', PRESETS)
def test_save_and_load_go_on_the_same(preset, opt, tmp_path):
    def fresh(seed): return learner(sparse_mlp(seed=seed), opt_func=OPTS[opt], cbs=dst(preset), tmp=tmp_path)
    learn,twin = fresh(0),fresh(5)
    learn.fit(3, lr=.01)
    learn.save('sparse')
    twin.load('sparse', weights_only=False)
    assert not changed(snapshot(learn.model, learn.opt), snapshot(twin.model, twin.opt)) and masked_are_zero(twin.model)
    for l in (learn, twin): l.fit(3, lr=.01)
    assert not changed(snapshot(learn.model, learn.opt), snapshot(twin.model, twin.opt))

@pytest.mark.filterwarnings('ignore:Saved file')
def test_load_rolls_masks_back_with_weights(tmp_path):
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst(), tmp=tmp_path)
    learn.fit(2)
    learn.save('early', with_opt=False)
    early = snapshot(learn.model)
    learn.fit(3)
    assert changed(early, snapshot(learn.model))
    learn.load('early')                                                                  # the optimizer keeps the state of the newer masks
    assert not changed(early, snapshot(learn.model))
    def check(l): assert all((v[~mask]==0).all() for *_,p,mask in masked_params(l.model) for v in opt_tensors(l.opt, p).values())
    watch(learn, check)
    learn.fit(2)
    assert masked_are_zero(learn.model)

def test_save_model_callback(tmp_path):
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=[dst(), SaveModelCallback()], tmp=tmp_path)
    before = nnz(learn.model)
    learn.fit(4)
    assert nnz(learn.model)==before and masked_are_zero(learn.model)

def exportable_dls(n_iter=8):
    from fastai.data.core import Datasets
    data = [(x,y) for xs,ys in batches(n_iter) for x,y in zip(xs, ys)]
    dsets = Datasets(range(len(data)), tfms=[[Item(data, 0)], [Item(data, 1)]], splits=[range(len(data)), range(16)])
    return dsets.dataloaders(bs=8, shuffle=False, num_workers=0, device='cpu')

class Item:
    "The input or the target of example `i`"
    def __init__(self, data, which): self.data,self.which = data,which
    def __call__(self, i): return self.data[i][self.which]

@pytest.mark.filterwarnings('ignore:load_learner')
@pytest.mark.parametrize('preset', PRESETS)
def test_export(preset, tmp_path):
    learn = Learner(exportable_dls(), sparse_mlp(), loss_func=nn.CrossEntropyLoss(), opt_func=fo.Adam, cbs=dst(preset), path=tmp_path)
    learn.logger = noop
    learn.remove_cb(ProgressCallback).fit(3)
    before = snapshot(learn.model)
    learn.export('m.pkl')
    loaded = load_learner(tmp_path/'m.pkl')
    assert not changed(before, snapshot(loaded.model)) and loaded.dynamic_sparse_training.method==learn.dynamic_sparse_training.method
    x = batches(1)[0][0]
    clean = loaded.model(x)
    with torch.no_grad():
        for _,_,p,mask in masked_params(loaded.model): p[~mask] = 9.
    assert torch.equal(loaded.model(x), clean) and masked_are_zero(loaded.model)          # hooks still enforce
    assert not changed(before, snapshot(learn.model))

def test_deepcopied_learner_trains_on_its_own():
    learn = learner(opt_func=FASTAI_OPTS['momentum'], cbs=dst())
    learn.fit(1)
    before,twin = snapshot(learn.model),copy.deepcopy(learn.model)
    other = learner(twin, opt_func=FASTAI_OPTS['momentum'], cbs=dst())
    other.fit(3)
    assert not changed(before, snapshot(learn.model)) and not same_masks(masks(twin), masks(learn.model)) and masked_are_zero(twin)

# ------------------------------------------------------------ a model like the ones people train
def test_convnet_with_batchnorm():
    model = nn.Sequential(nn.Linear(8,18), nn.Unflatten(1, (2,3,3)), nn.Conv2d(2,6,2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24,3))
    learn = learner(model, opt_func=FASTAI_OPTS['adam'], cbs=dst()).sparsify(.5)
    before,start = nnz(model),masks(model)
    learn.fit_one_cycle(4, 1e-2)
    assert nnz(model)==before and masked_are_zero(model) and not any(torch.equal(a, b) for a,b in zip(start, masks(model)))

# ------------------------------------------------------------ intervals, and masks as a preset wants them
def test_interval_as_a_share_of_training():
    "A twentieth of forty steps is each two"
    model,seen = sparse_mlp(),[]
    cb = DynamicSparseTrainingCallback(batches_per_update=.05, replaces_step=False, stop_pct=1.)
    learn = learner(model, cbs=cb)
    learn.fit(4, cbs=Watch('after_step', lambda l: seen.append(masks(l.model))))
    moved = [i+1 for i,(a,b) in enumerate(zip([masks(sparse_mlp()), *seen], seen)) if not same_masks(a, b)]
    assert cb.timed.batches_per_update==2 and all(i%2==0 for i in moved) and len(moved)>10

def test_an_interval_of_an_epoch_needs_the_callback():
    with pytest.raises(ValueError, match='once an epoch.*give a number.*in_steps'): DSTMethod(batches_per_update=None).due(1, total=40)
    with pytest.raises(ValueError, match='a share of training.*give a number.*in_steps'): DSTMethod(batches_per_update=.1).interval

@pytest.mark.parametrize('name,start', [('GMP', 1.), ('GraNet_half', .5), ('RigL', .2)])
def test_sparsify_as_a_preset_wants_it(name, start):
    learn = learner(mlp(8, 24, 20, 3))
    preset = getattr(presets, f'{name}_presets')
    assert learn.sparsify(.8, preset=preset) is learn and sum(nnz(learn.model))==pytest.approx(start*n_params(learn.model), abs=2)
    learn.fit(4, cbs=DynamicSparseTrainingCallback(**{**preset, 'batches_per_update': 5, 'replaces_step': False}))
    assert sum(nnz(learn.model))==round(.2*n_params(learn.model)) and masked_are_zero(learn.model)

def test_too_short_a_training_warns_before_it_starts():
    learn = learner(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    learn.sparsify(.5, preset=presets.GMP_presets)
    with pytest.warns(UserWarning, match='no update falls into 10 optimizer steps'): learn.fit(1, cbs=DynamicSparseTrainingCallback(**{**presets.GMP_presets, 'batches_per_update': 100}))

@pytest.mark.parametrize('name', ['RigL', 'GMP', 'GraNet', 'SET', 'SNFS', 'Chase'])
def test_presets_reach_their_sparsity_in_a_short_training(name):
    "Forty steps, without a setting: no warning that no update falls into them, masks that move, and the budget in the end"
    learn = learner(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)), opt_func=FASTAI_OPTS['momentum'])
    learn.sparsify(.8, preset=(preset := getattr(presets, f'{name}_presets')))
    start = masks(learn.model)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*no update falls.*')
        learn.fit(4, cbs=DynamicSparseTrainingCallback(**preset))
    assert sum(nnz(learn.model))==pytest.approx(.2*n_params(learn.model), abs=2) and not same_masks(start, masks(learn.model))

# ------------------------------------------------------------ events
def test_events_that_a_subclass_or_a_user_adds_are_called():
    "And `run=False` switches all off"
    class Mine(DynamicSparseTrainingCallback):
        def after_batch(self): seen.append('of a class')
    for run,want in ((True, {'of a class': 3, 'of an instance': 3}), (False, {})):
        seen = []
        cb = Mine(**{**Static_presets, 'batches_per_update': 10})
        cb.after_loss = lambda: seen.append('of an instance')
        cb.run = run
        learner(sparse_mlp(), n_iter=3).fit(1, cbs=cb)
        assert {k: seen.count(k) for k in seen}==want
        assert cb.run                                                                      # fastai switches it on again after a fit

# ------------------------------------------------------------ a method in the first place
@pytest.mark.parametrize('first', ['rigl', 'RigL_presets', presets.RigL_presets, presets.RigL()], ids=['name', 'name of a dict', 'dict', 'method'])
def test_a_method_in_the_first_place(first):
    cb = DynamicSparseTrainingCallback(first)
    assert cb.method==presets.RigL() and cb.sparse_modules is None and repr(cb)=='DynamicSparseTrainingCallback(RigL())'
    assert DynamicSparseTrainingCallback(first, batches_per_update=20, seed=3).method==presets.RigL(update_every=20, seed=3)

@pytest.mark.parametrize('bad', [3, 0.5, [1], object()], ids=['whole', 'share', 'list', 'object'])
def test_what_is_no_module_is_refused_at_once(bad):
    with pytest.raises(TypeError, match='sparse_modules must be modules, a DSTMethod, a preset or the name of one, got'): DynamicSparseTrainingCallback(bad)

def test_a_misspelt_method_is_refused_at_once():
    with pytest.raises(ValueError, match="got 'rigel': did you mean rigl"): DynamicSparseTrainingCallback('rigel')

def test_by_name_is_the_same_run():
    runs = []
    for cb in (DynamicSparseTrainingCallback('set', batches_per_update=8), DynamicSparseTrainingCallback(**{**presets.SET_presets, 'batches_per_update': 8})):
        learn = learner()
        learn.fit(2, cbs=cb)
        runs.append(snapshot(learn.model))
    assert not changed(*runs)

def test_sparsify_takes_a_method_by_name():
    for m in ('gmp', presets.GMP_presets, presets.GMP()):
        learn = learner(mlp(8,24,20,3)).sparsify(.5, preset=m)
        assert all(mask.all() for _,mask,_ in sparse_params(learn.model))

# ------------------------------------------------------------ one method in a learner
def both(learn, **kw): learn.fit(1, cbs=dst(**kw))
TWICE = dict(together    = lambda: learner(cbs=[dst(), dst('SNFS')]).fit(1),
             apart       = lambda: learner(cbs=dst()).fit(1, cbs=dst()),
             same        = lambda: learner(cbs=(cb := dst())).fit(1, cbs=cb),
             in_fit      = lambda: learner().fit(1, cbs=[dst(), dst()]),
             fine_tune   = lambda: learner(cbs=dst()).fine_tune(1, cbs=dst('SET')),
             with_others = lambda: learner(n_iter=12, cbs=[dst(), fp16.MixedPrecision()]).fit_one_cycle(1, cbs=dst('SET')))
@pytest.mark.parametrize('fit', TWICE.values(), ids=TWICE)
def test_the_callback_twice_is_refused_by_name(fit, monkeypatch):
    models,was = [],DST._check_alone
    def check(self):
        models.append((self.learn.model, snapshot(self.learn.model)))
        was(self)
    monkeypatch.setattr(DST, '_check_alone', check)
    with pytest.raises(ValueError, match='a Learner must have one DynamicSparseTrainingCallback, got 2: give it to'): fit()
    (model,before), = models
    assert not changed(before, snapshot(model)) and all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('preset', PRESETS)
def test_the_callback_beside_attach_is_refused_by_name(preset):
    learn = learner(opt_func=wrapped(TORCH_OPTS['momentum']))
    learn.create_opt()
    attached = attach(presets.RigL(update_every=5), learn, learn.opt, 40)
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match=r'a Learner must have one method, got this callback and Attached.*call `remove\(\)`'): learn.fit(1, cbs=dst(preset))
    assert not changed(before, snapshot(learn.model)) and attached.step==0
    attached.remove()
    learn.fit(1, cbs=dst(preset))
    assert changed(before, snapshot(learn.model))

def test_after_a_refusal_the_learner_trains():
    learn = learner(cbs=dst())
    with pytest.raises(ValueError, match='got 2'): both(learn, preset='SET')
    learn.fit(2)
    assert masked_are_zero(learn.model) and learn.cbs[-1].n_step==20

# ------------------------------------------------------------ masks that nothing rewires
def notes(*fits):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        for f in fits: f()
    return [w for w in seen if 'no DynamicSparseTrainingCallback' in str(w.message)]

def test_static_masks_are_noted_once():
    learn = learner()
    found = notes(lambda: learn.lr_find(show_plot=False, num_it=5), lambda: learn.fit(1), lambda: learn.fit_one_cycle(1), lambda: learn.fine_tune(1), learn.validate)
    assert len(found)==1 and "add `DynamicSparseTrainingCallback('static')`" in str(found[0].message)
    learn = learner(mlp(8,24,20,3))
    assert len(notes(lambda: learn.fit(1), lambda: learn.sparsify(.5), lambda: learn.fit(1), lambda: learn.fit(1)))==1

def test_what_was_meant_is_not_noted():
    def attached():
        learn = learner(opt_func=wrapped(TORCH_OPTS['momentum']))
        learn.create_opt()
        attach(presets.RigL(update_every=5), learn, learn.opt, 40)
        learn.fit(1)
    def other():
        "A callback of the user's own that runs a method"
        class Own(Callback):
            def __init__(self): self.method = presets.RigL(update_every=5)
        learner(cbs=Own()).fit(1)
    def lent():
        learn = learner(mlp(8,24,20,3))
        learn.sparsify(.5).unsparsify().fit(1)
    fits = [lambda: learner(cbs=DST('static')).fit(1), lambda: learner(cbs=DST(**Static_presets)).fit(1), lambda: learner(cbs=dst()).fine_tune(1),
            lambda: learner().fit(1, cbs=dst('SET')), lambda: learner(mlp(8,24,20,3)).fit(1), lambda: learner().validate(), lambda: learner().get_preds(), attached, other, lent]
    assert not notes(*fits)

# ------------------------------------------------------------ a file of a model of another form
def in_form(form):
    learn = learner(sparse_mlp() if form!='dense' else mlp(8,24,20,3), opt_func=FASTAI_OPTS['adam'])
    if form=='other layers':
        learn.unsparsify()
        learn.sparsify(.6, exclude=0)
    if form=='compressed': to_sparse_layers(learn, least=0.)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1)
    return learn

WAYS = {('masked', 'dense'): 'has masks for layers that are dense here: call `learn.sparsify`', ('dense', 'masked'): 'has no masks for layers that are sparse here: load it before',
        ('masked', 'other layers'): 'has masks for layers that are dense here', ('other layers', 'masked'): 'has no masks for layers that are sparse here',
        ('compressed', 'masked'): 'call `to_sparse_layers', ('compressed', 'dense'): 'call `to_sparse_layers', ('masked', 'compressed'): 'call `to_masked_layers', ('dense', 'compressed'): 'call `to_masked_layers'}
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('ours,theirs', WAYS, ids=str)
def test_load_of_another_form_is_one_sentence(ours, theirs, tmp_path):
    in_form(ours).save(tmp_path/'file')
    with pytest.raises(RuntimeError) as e: in_form(theirs).load(tmp_path/'file')
    assert WAYS[ours,theirs] in str(e.value) and 'file' in str(e.value) and 'key(s)' not in str(e.value) and '\n' not in str(e.value)

@pytest.mark.filterwarnings('ignore')
def test_the_ways_out_of_another_form(tmp_path):
    sparse,dense = in_form('masked'),in_form('dense')
    sparse.save(tmp_path/'sparse')
    dense.save(tmp_path/'dense')
    learn = in_form('dense')
    learn.sparsify(.3)
    assert not changed(snapshot(sparse.model), snapshot(learn.load(tmp_path/'sparse').model))
    before = masks(sparse.model)
    sparse.load(tmp_path/'dense', strict=False)
    sparse.validate()
    assert same_masks(before, masks(sparse.model)) and masked_are_zero(sparse.model)
    packed = in_form('compressed')
    packed.save(tmp_path/'packed')
    again = in_form('masked')
    to_sparse_layers(again, least=0.)
    again.load(tmp_path/'packed')
    assert not changed(snapshot(packed.model), snapshot(again.model))

def test_load_of_another_model_is_as_ever(tmp_path):
    learner(mlp(8,5,3)).save(tmp_path/'file', with_opt=False)
    with pytest.raises(RuntimeError, match='size mismatch for 0.weight'): learner(mlp(8,6,3)).load(tmp_path/'file', with_opt=False)
    with pytest.raises(FileNotFoundError): learner().load(tmp_path/'nothing')
