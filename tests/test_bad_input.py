"Bad input is refused before anything changes, with the value and the way out in the message"
import dataclasses
import math, re, warnings
from functools import partial
import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from fastai import optimizer as fo
from fastai.callback.core import Callback
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.distributions import *
from sparsefast.masks import *
from sparsefast.methods import DSTMethod
from sparsefast.patterns import block_pattern, drop_grow, nm_pattern
from sparsefast.scores import *
from sparsefast.guard import *
from sparsefast.sparsify import *
from sparsefast.topk import top_k_mask
from helpers import *                                                                    # last: its `nnz` counts a model's

NO_FRACTIONS = [-.1, 1.1, 90, math.nan, math.inf, None, 'much', [.5], -1e-9]

def refused(f, *args, error=ValueError, match, model=None, opt=None):
    "`f` raises, and neither the model, its hooks, the optimizer nor torch's generator has changed"
    before,rng = snapshot(model, opt) if model is not None else {},torch.get_rng_state()
    n_hooks = lambda: [] if model is None else [len(m._forward_pre_hooks) for m in model.modules()]
    hooks = n_hooks()
    with pytest.raises(error, match=match): f(*args)
    if model is not None: assert hooks==n_hooks() and not changed(before, snapshot(model, opt)) and torch.equal(rng, torch.get_rng_state())

def named(v): return re.escape(repr(v))

# ------------------------------------------------------------ functions that are none, or others
@pytest.mark.parametrize('kwargs,match', [(dict(sparse_f=3), "sparse_f must be a function, such as `erdos_renyi_sparsity`, got 3"), (dict(score_f='magnitude'), 'score_f must be a function'),
    (dict(pattern_f='2:4'), "pattern_f must be a function, such as `nm_pattern`, got '2:4'"), (dict(init_f='sparse'), 'init_f must be a function, such as `sparse_kaiming_normal_`'),
    (dict(init_f=nn.init.kaiming_normal_), r'init_f must be called as .*transposed=.*got kaiming_normal_'), (dict(sparsities=[.5]), r'sparsities must be a dict.*got \[0.5\]'), (dict(masks=[1]), 'masks must be a dict')])
def test_what_sparsify_model_is_given(kwargs, match):
    model = mlp(8, 16, 4)
    refused(lambda: sparsify_model(model, .5, **kwargs), error=TypeError, match=match, model=model)
    sparsify_model(model, .5)                                                                # nothing is left behind

def test_an_initialisation_that_fails_leaves_the_model():
    model = mlp(8, 16, 4)
    before = snapshot(model)
    def odd(p, mask, transposed):
        if len(p)==4: raise RuntimeError('no')
        p.zero_()
    with pytest.raises(RuntimeError, match='no'): sparsify_model(model, .5, init_f=odd)
    assert not changed(before, snapshot(model)) and not any('mask' in n for n,_ in model.named_buffers())

@pytest.mark.parametrize('pattern_f,match', [(partial(nm_pattern, n=5, m=4), 'whole numbers with 1 <= n <= m.*5:4'), (partial(nm_pattern, n=0, m=4), '0:4'), (partial(nm_pattern, n=0, m=0), '0:0'),
    (partial(block_pattern, size=(0, 4)), r'two whole numbers.*\(0, 4\)'), (partial(block_pattern, size=4), 'got 4')])
def test_sizes_of_patterns(pattern_f, match):
    model = mlp(8, 16, 4)
    refused(lambda: sparsify_model(model, .5, pattern_f=pattern_f), match=match, model=model)

def test_layers_that_come_out_empty_are_named():
    "Also where the distribution says that all should go; not where the user does"
    model = mlp(8, 16, 16, 4)
    model[0].weight.data.mul_(1e-6)
    with pytest.warns(UserWarning, match="'0': none of 128 weights is active.*erdos_renyi_sparsity"): sparsify_model(model, .7, sparse_f=global_sparsity(weight_magnitude), score_f=weight_magnitude)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify_model(model := mlp(8, 16, 16, 4), .7, sparsities={'0': 1.})
    with pytest.warns(UserWarning, match='none of 128 weights is active'): METHOD().check(model, torch.optim.SGD(model.parameters(), lr=.1))
    zeros = mlp(8, 16, 16, 4)
    nn.init.zeros_(zeros[2].weight)
    with pytest.warns(UserWarning, match="'2': none of 256 weights is active"): sparsify_model(zeros, masks='zeros')

# ------------------------------------------------------------ masks and distributions
@pytest.mark.parametrize('bad', NO_FRACTIONS, ids=repr)
def test_sparsity(bad):
    says = f'sparsity must be a number from 0 to 1, got {named(bad)}'
    for f in (partial(sparse_mask, (3,4)), partial(sparse_mask_like, torch.ones(3,4))): refused(f, bad, match=says)
    for f in (uniform_sparsity, first_layer_dense_uniform, erdos_renyi_sparsity): refused(f, [torch.ones(3,4)]*2, bad, match='model_'+says)

@pytest.mark.parametrize('n_keep', [-1, 13, 100])
def test_n_keep(n_keep): refused(top_k_mask, torch.ones(3,4), n_keep, match=f'n_keep must be .* 12, got {n_keep}')

def test_n_keep_among():
    refused(lambda: top_k_mask(torch.ones(4), 3, among=torch.tensor([1,0,1,0]).bool()), match='candidates, 2, got 3')
    refused(lambda: drop_grow(torch.ones(4).bool(), torch.ones(4), torch.ones(4), 5), match='got -1')
    refused(lambda: drop_grow(torch.ones(4).bool(), torch.ones(4), torch.ones(4), 1, 2), match='candidates, 1, got 2')

def test_n_keep_must_be_whole(): refused(lambda: top_k_mask(torch.ones(4), 2.5), error=(TypeError, ValueError), match='2.5|float')

BAD_MASKS = dict(dtype=torch.ones(3,4), int=torch.ones(3,4, dtype=torch.long), shape=torch.ones(4,3).bool(),
                 flat=torch.ones(12).bool(), broadcast=torch.ones(1,4).bool())
@pytest.mark.parametrize('mask', BAD_MASKS.values(), ids=BAD_MASKS)
def test_mask_of_wrong_shape_or_dtype(mask):
    model = nn.Sequential(nn.Linear(3,4), nn.Linear(4,3))
    refused(add_mask, model[1], 'weight', mask, match=r"'weight' must be boolean with shape \(3, 4\), got torch", model=model)
    model[1].register_buffer('weight_mask', mask)
    opt = TORCH_OPTS['sgd'](model.parameters())
    for p in model.parameters(): p.grad = torch.ones_like(p)
    method,says = DSTMethod(batches_per_update=8),r'weight_mask.* must be boolean with shape \(3, 4\), got torch'
    due = dict(opt=opt, step=8, pct=0.)
    for f in (sparse_params, apply_masks, partial(method.step, **due), partial(method.update, **due), partial(method.enforce, opt=opt)):
        refused(f, model, match=says, model=model, opt=opt)

@pytest.mark.parametrize('f', [apply_masks, partial(apply_masks, inplace=False), unsparsify_model, enforce_masks, partial(DSTMethod().enforce, opt=None)],
                         ids=['in place','new data','unsparsify','enforce_masks','enforce'])
def test_first_mask_is_not_applied_when_the_second_is_wrong(f):
    model = nn.Sequential(nn.Linear(3,4), nn.Linear(4,3))
    model[0].register_buffer('weight_mask', torch.zeros(4,3).bool())
    model[1].register_buffer('weight_mask', torch.zeros(4,4).bool())
    refused(f, model, match=r'weight_mask.* must be boolean with shape \(3, 4\)', model=model)

# ------------------------------------------------------------ sparsify_model
@pytest.mark.parametrize('bad', NO_FRACTIONS, ids=repr)
@pytest.mark.parametrize('sparse_f', [uniform_sparsity, first_layer_dense_uniform, erdos_renyi_sparsity], ids=lambda f: f.__name__)
def test_model_sparsity(bad, sparse_f):
    model = mlp(4,5,3)
    refused(sparsify_model, model, bad, sparse_f, match=f'model_sparsity must be a number from 0 to 1, got {named(bad)}', model=model)

def test_nothing_to_sparsify():
    for model in (nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3)), nn.Embedding(3,4)):
        refused(sparsify_model, model, .5, match='no layer that can be made sparse.*additional_types', model=model)

def test_twice_names_the_way_back():
    model = mlp(4,5,3)
    sparsify_model(model, .5)
    refused(sparsify_model, model, .5, match="layer '0' is already sparse.*unsparsify_model", model=model)
    outer = nn.Sequential(nn.Linear(4,4), model)                                         # one sparse layer among others
    refused(sparsify_model, outer, .5, match='already sparse.*unsparsify_model', model=outer)
    unsparsify_model(model)
    sparsify_model(model, .5)

@pytest.mark.parametrize('returns,says', [([.5], '1 sparsities for 2'), ([.5]*3, '3 sparsities for 2'), ([.5,1.5], 'layer 1.*got 1.5'),
                                          ([-.1,.5], 'layer 0.*got -0.1'), ([.5,None], 'layer 1.*got None'), ([.5,math.nan], 'layer 1.*got nan')], ids=repr)
def test_what_a_distribution_returns(returns, says):
    model = mlp(4,5,3)
    refused(sparsify_model, model, .5, lambda params, s: returns, match=says, model=model)

def test_distribution_that_raises():
    model = mlp(4,5,3)
    refused(sparsify_model, model, .5, lambda params, s: 1/0, error=ZeroDivisionError, match='.', model=model)

def test_parametrized_and_lazy_layers():
    model = nn.Sequential(nn.Linear(4,4), parametrizations.weight_norm(nn.Linear(4,4)))
    refused(sparsify_model, model, .5, match='1 has no plain parameter.*remove_parametrizations', model=model)
    lazy = nn.Sequential(nn.Linear(4,4), nn.LazyLinear(4))
    before = lazy[0].weight.detach().clone()
    with pytest.raises(ValueError, match='1 does not know its shape yet.*one batch'): sparsify_model(lazy, .5)
    assert torch.equal(before, lazy[0].weight) and not masks(lazy[:1])

@pytest.mark.parametrize('bad', [None, 'model', 3, []], ids=repr)
def test_no_model(bad):
    with pytest.raises((TypeError, ValueError, AttributeError)): sparsify_model(bad, .5)

# ------------------------------------------------------------ methods
@pytest.mark.parametrize('bad', NO_FRACTIONS, ids=repr)
@pytest.mark.parametrize('key', ['initial_drop_grow_pct','final_drop_grow_pct','stop_pct'])
@pytest.mark.parametrize('make', [DSTMethod, DynamicSparseTrainingCallback])
def test_fractions(make, key, bad): refused(lambda: make(**{key: bad}), match=f'{key} must be a number from 0 to 1, got {named(bad)}')

@pytest.mark.parametrize('key', ['initial_drop_grow_pct','final_drop_grow_pct','stop_pct'])
def test_a_fraction_in_words_is_refused(key):
    "Not accepted first and found unusable in the middle of training"
    refused(lambda: DSTMethod(**{key: '0.5'}, batches_per_update=8), match=f"{key} must be a number from 0 to 1, got '0.5'")

@pytest.mark.parametrize('bad', [0, -1, 1.5, 100., 'epoch', math.nan, [1]], ids=repr)
@pytest.mark.parametrize('make', [DSTMethod, DynamicSparseTrainingCallback])
def test_interval(make, bad): refused(lambda: make(batches_per_update=bad), match=f'batches_per_update must be .*got {named(bad)}')

@pytest.mark.parametrize('key', ['keep_score_f','grow_score_f','drop_sched_f'])
@pytest.mark.parametrize('bad', [None, 'weight_magnitude', 3], ids=repr)
def test_functions(key, bad):
    for make in (DSTMethod, DynamicSparseTrainingCallback):
        refused(lambda: make(**{key: bad}), error=(TypeError, ValueError), match=f'{key} must be a function, got {named(bad)}')

@pytest.mark.parametrize('bad', ['importance', 3, True], ids=repr)
@pytest.mark.parametrize('key', [f.name for f in dataclasses.fields(DSTMethod) if f.name.endswith('_f')])
def test_each_setting_that_is_a_function_must_be_one(key, bad):
    refused(lambda: DSTMethod(**{key: bad}), error=TypeError, match=f'{key} must be a function.*{named(bad)}')

@pytest.mark.parametrize('make', [DSTMethod, DynamicSparseTrainingCallback])
@pytest.mark.parametrize('key,meant', [('batch_per_update','batches_per_update'), ('initial_drop_grow','initial_drop_grow_pct'),
                                       ('keep_score','keep_score_f'), ('stop_pc','stop_pct')])
def test_misspelt_key(make, key, meant): refused(lambda: make(**{key: .3}), error=TypeError, match=f"{key}.*{meant}")

def test_unknown_key():
    for make in (DSTMethod, DynamicSparseTrainingCallback): refused(lambda: make(zzz=1), error=TypeError, match="'zzz'.*initial_drop_grow_pct")

def test_no_interval_in_a_plain_loop():
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    backward(model, *batches(1)[0])
    for preset in ('SET','SNFS'):
        m = DSTMethod(**{**PRESETS[preset], 'batches_per_update': None})
        for f in (lambda: m.due(1, 0.), lambda: m.step(model, opt, 1, 0.), lambda: m.update(model, opt, 1, 0.)):
            refused(f, match='batches_per_update is None.*give a number', model=model, opt=opt)

def test_too_many_updates_warn():
    with pytest.warns(UserWarning, match=r'25%.*batches_per_update=4'): DSTMethod(batches_per_update=4, stop_pct=1.)
    with pytest.warns(UserWarning, match='longer interval'): DynamicSparseTrainingCallback(batches_per_update=7)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DSTMethod(batches_per_update=8); DSTMethod(batches_per_update=1, replaces_step=False); DSTMethod(batches_per_update=10, stop_pct=1.)

def test_too_short_an_epoch_warns():
    "The interval is known only when training starts: once an epoch of four batches costs a quarter of all steps"
    learn = learner(n_iter=4, opt_func=fo.Adam, cbs=DynamicSparseTrainingCallback(stop_pct=1.))
    with pytest.warns(UserWarning, match='25%'): learn.fit(2)

METHOD = partial(DSTMethod, batches_per_update=8)
@pytest.mark.parametrize('model', [mlp(4,3), nn.ReLU(), []], ids=['dense','empty','list'])
def test_no_masks(model):
    opt = TORCH_OPTS['sgd'](mlp(4,3).parameters())
    is_model = isinstance(model, nn.Module)
    for f in (partial(METHOD().step, opt=opt, step=1, pct=0.), partial(METHOD().check, opt=opt)):
        refused(f, model, match='must have a mask.*sparsify_model', model=model if is_model else None)

def with_batchnorm(): return nn.Sequential(nn.Linear(8,6), nn.BatchNorm1d(6), nn.Linear(6,3))

@pytest.mark.parametrize('preset', PRESETS)
def test_callback_without_masks(preset):
    learn = learner(with_batchnorm(), opt_func=partial(fo.SGD, mom=.9))                  # a single forward would show
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='(?s)must have a mask.*sparsify_model'): learn.fit(1, cbs=DynamicSparseTrainingCallback(**PRESETS[preset]))
    assert not changed(before, snapshot(learn.model))

def test_callback_with_modules_without_masks():
    learn = learner()
    with pytest.raises(ValueError, match='(?s)must have a mask'): learn.fit(1, cbs=DynamicSparseTrainingCallback(sparse_modules=[nn.Linear(3,4)], batches_per_update=8))

OPTS = dict(torch=TORCH_OPTS['sgd'], fastai=partial(fo.SGD, lr=.1), rmsprop=partial(fo.RMSProp, lr=.1), wrapped=wrapped(TORCH_OPTS['sgd']))
@pytest.mark.parametrize('opt', OPTS)
def test_optimizer_without_momentum(opt):
    model = sparse_mlp()
    optim,m = OPTS[opt](list(model.parameters())),DSTMethod(**{**SNFS_presets, 'batches_per_update': 8})
    backward(model, *batches(1)[0])
    for f in (m.check, partial(m.step, step=1, pct=0.)): refused(f, model, optim, match='momentum.*mom=0.9.*momentum=0.9', model=model, opt=optim)
    if opt=='torch': return                                                             # no optimizer for a learner
    learn = learner(with_batchnorm(), opt_func=OPTS[opt]).sparsify(.5)
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='(?s)momentum.*mom=0.9'): learn.fit(1, cbs=DynamicSparseTrainingCallback(**SNFS_presets))
    assert not changed(before, snapshot(learn.model))

def test_master_copies_are_refused():
    class NonNativeMixedPrecision(Callback): "fastai's asks for a GPU"
    learn = learner(cbs=[DynamicSparseTrainingCallback(batches_per_update=8), NonNativeMixedPrecision()])
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='(?s)NonNativeMixedPrecision.*to_fp16'): learn.fit(1)
    assert not changed(before, snapshot(learn.model))

@pytest.mark.parametrize('which', ['keep_score_f','grow_score_f'])
def test_score_of_the_wrong_shape(which):
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, METHOD(), total=3)
    backward(model, *batches(1)[0])
    bad = METHOD(**{which: lambda p, **kw: p.grad.abs().sum(1) if p is model[4].weight else p.grad.abs()})   # the last layer's
    refused(bad.update, model, opt, 8, 0., match=r'must return a tensor of shape \(3, 20\), got \(3,\)', model=model, opt=opt)

def test_score_that_raises_changes_nothing():
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, METHOD(), total=3)
    backward(model, *batches(1)[0])
    def f(p, **kw):
        if p is model[4].weight: raise RuntimeError('no score today')
        return p.grad.abs()
    refused(METHOD(grow_score_f=f).update, model, opt, 8, 0., error=RuntimeError, match='no score today', model=model, opt=opt)

@pytest.mark.parametrize('asks', [[1000,0,0], [-1,1,0], [10**9]*3, [0,0,100]], ids=str)
def test_redistribution_that_asks_for_too_much(asks):
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, METHOD(), total=3)
    backward(model, *batches(1)[0])
    refused(METHOD(redistribute_f=lambda *args: asks).update, model, opt, 8, 0., match='must return growth', model=model, opt=opt)

def test_redistribution_that_loses_a_layer():
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    backward(model, *batches(1)[0])
    refused(METHOD(redistribute_f=lambda imp, nnz, numel, n_drop: n_drop[:-1]).update, model, opt, 8, 0., error=ValueError, match='.', model=model, opt=opt)

def test_schedule_outside_the_fractions():
    model = sparse_mlp()
    opt = TORCH_OPTS['momentum'](model.parameters())
    backward(model, *batches(1)[0])
    for f in (1.5, -.5, math.nan): refused(METHOD(drop_sched_f=lambda *args: f).update, model, opt, 8, 0., error=ValueError, match='.', model=model, opt=opt)

def test_scores_of_nan_are_ranked_last():
    "A weight that has become NaN is the first to go; the count holds"
    model = sparse_mlp()
    where,before = tuple(model[0].weight_mask.nonzero()[0]),nnz(model)
    with torch.no_grad(): model[0].weight[where] = math.nan
    for p in model.parameters(): p.grad = torch.ones_like(p)
    model[0].weight.grad[where] = 0.                                                     # or it would come straight back
    METHOD().update(model, TORCH_OPTS['sgd'](model.parameters()), 8, 0.)
    assert nnz(model)==before and model[0].weight.isfinite().all()

# ------------------------------------------------------------ what people do to a model between sparsifying and training
def test_mask_of_another_dtype_later():
    model = sparse_mlp()
    opt = TORCH_OPTS['sgd'](model.parameters())
    model[2].weight_mask = model[2].weight_mask.float()
    for f in (partial(METHOD().step, opt=opt, step=1, pct=0.), apply_masks, lambda m: m(torch.randn(2, 8)), sparse_params): refused(f, model, match='weight_mask.*must be boolean', model=None)

def test_mask_left_behind_on_another_device():
    model = sparse_mlp()
    model[0]._buffers['weight_mask'] = model[0].weight_mask.to('meta')
    refused(sparse_params, model, match="weight_mask.*must be on cpu like its parameter, got meta: move the whole model, `model.to.'cpu'.`")

def test_model_moved_as_a_whole():
    "Double and back, another device and back: masks and targets go along"
    model = sparse_mlp()
    before = masks(model)
    plain_loop(model.double(), TORCH_OPTS['momentum'](model.parameters()), METHOD(), total=10, dtype=torch.float64)
    assert nnz(model)==[int(m.sum()) for m in before] and {m.dtype for m in masks(model)}=={torch.bool}
    moved = sparse_mlp().to('meta')
    assert all(mask.device==p.device==torch.device('meta') for *_,p,mask in masked_params(moved))

def test_parameter_replaced_after_the_optimizer_was_made():
    "The mask belongs to the name, so it holds; that nothing trains the new one is said"
    model = sparse_mlp()
    opt = TORCH_OPTS['sgd'](model.parameters())
    model[0].weight = nn.Parameter(torch.ones(24, 8))
    with pytest.warns(UserWarning, match='`weight` of Linear.in_features=8.*does not know.*replaced'): plain_loop(model, opt, METHOD(), total=1)
    assert masked_are_zero(model)
    learn = learner()
    learn.create_opt()
    learn.model[0].weight = nn.Parameter(torch.ones(24, 8))
    with pytest.warns(UserWarning, match='does not know'): learn.fit(1, cbs=DynamicSparseTrainingCallback(batches_per_update=8))

TAKERS = dict(parametrization=lambda m: parametrizations.weight_norm(m), weight_norm=lambda m: torch.nn.utils.weight_norm(m), pruning=lambda m: prune.l1_unstructured(m, 'weight', .5),
              nothing=lambda m: setattr(m, 'weight', None))
@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('take', TAKERS)
def test_parameter_taken_away_after_sparsify(take):
    "Its mask is left behind, and would be for nothing"
    model = sparse_mlp()
    TAKERS[take](model[2])
    opt,says = TORCH_OPTS['sgd'](model.parameters()),r'(?s)2\.weight: .*has a mask for `weight`, which is no plain parameter any more.*undo that'
    for f in (partial(METHOD().step, model, opt, 1, 0.), partial(METHOD().check, [model], opt)): refused(f, match=says)
    learn = learner(model)
    with pytest.raises(ValueError, match=says): learn.fit(1, cbs=DynamicSparseTrainingCallback(batches_per_update=8))

def test_frozen_parameters_may_be_unknown():
    model = sparse_mlp()
    model[0].weight.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plain_loop(model, TORCH_OPTS['sgd']([p for p in model.parameters() if p.requires_grad]), METHOD(), total=3)

def test_modules_added_later_are_dense():
    model = sparse_mlp()
    model.append(nn.Linear(3, 3))
    before = nnz(model)
    plain_loop(model, TORCH_OPTS['momentum'](model.parameters()), METHOD(), total=20)
    assert nnz(model)==before and model[-1].weight.count_nonzero()==9

def test_layers_without_weights():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    model.append(nn.Linear(0, 3)); del model[2].bias; model[2].bias = None
    sparsify_model(nn.Sequential(*model), .5)
    assert nnz(model)==[24, 9]

def test_half_precision_weights():
    for dtype in (torch.bfloat16, torch.float16):
        model = sparse_mlp(dtype=dtype)
        opt,before = TORCH_OPTS['momentum'](model.parameters()),nnz(model)
        for step in range(1, 21):
            for p in model.parameters(): p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            METHOD().step(model, opt, step, (step-1)/20)
            assert nnz(model)==before and masked_are_zero(model)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('preset', ['GMP', 'SRigL'])
def test_targets_rounded_by_a_conversion(preset, dtype):
    "A method that aims at the target sparsity must not aim at what half precision makes of it"
    from sparsefast import presets
    preset = {**getattr(presets, f'{preset}_presets'), 'batches_per_update': 20, 'replaces_step': False}
    model = mlp(40, 50, 3)
    sparsify_model(model, .9, **DSTMethod(**preset).start(.9))
    model.to(dtype)
    opt,method = TORCH_OPTS['sgd'](model.parameters()),DSTMethod(**preset)
    for p in model.parameters(): p.grad = torch.ones_like(p)
    for f in (partial(method.step, step=1, pct=0.), method.check): refused(lambda m, o: f(m, opt=o), model, opt, match=f'target sparsity of Linear.* has become 0.8.*{dtype}.*convert the model before `sparsify_model`', model=model, opt=opt)
    for m in (model[0], model[2]): m.weight_sparsity = torch.tensor(.9)
    method.check(model, opt)

@pytest.mark.parametrize('preset', PRESETS)
def test_conversion_to_half_precision_keeps_counts(preset):
    "What the mask itself counts needs no target"
    model = sparse_mlp()
    before = nnz(model)
    opt = TORCH_OPTS['momentum'](model.to(torch.bfloat16).parameters())
    plain_loop(model, opt, DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8}), total=20, dtype=torch.bfloat16)
    assert sum(nnz(model))==sum(before) and masked_are_zero(model)

def test_learner_without_an_optimizer_yet():
    learn = learner(cbs=DynamicSparseTrainingCallback(batches_per_update=8))
    assert learn.opt is None
    learn.model[0].weight.data.fill_(1.)
    learn.validate()
    assert learn.opt is None and masked_are_zero(learn.model)

def test_sharded_parameters():
    "In a process of its own, for it needs a process group: `fully_shard` before and after, and what is refused"
    import subprocess, sys
    code = f"""
import torch, torch.distributed as dist
dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from sparsefast.all import *
def made(late):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    if not late: sparsify_model(model, .5)
    fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
    if late: sparsify_model(model, .5)
    return model
for late in (False, True):
    model = made(late)
    try: sparse_doctor(model)
    except ValueError as e: print(e)
    DSTMethod(**Static_presets).check(model, torch.optim.SGD(model.parameters(), lr=.1))
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
sparsify_model(model, .5)
to_sparse_layers(model, least=0.)
fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
try: DSTMethod(**Static_presets).check(model, torch.optim.SGD(model.parameters(), lr=.1))
except ValueError as e: print(e)
"""
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    lines = p.stdout.splitlines()
    assert len(lines)==3 and all('model must be whole' in l for l in lines[:2]) and 'is compressed, and sharded over processes: call `to_masked_layers(model)` before `fully_shard`' in lines[2], p.stdout+p.stderr

# ------------------------------------------------------------ time
@pytest.mark.parametrize('kw,match', [(dict(step=0, total=10), 'step must be 1 or more, got 0: count optimizer steps from 1'), (dict(step=None, total=10), 'step must be 1 or more, got None'),
    (dict(step=5), 'total must be the number of optimizer steps in the training, 1 or more, got None'), (dict(step=5, total=0), 'got 0'), (dict(step=5, total=-3), 'got -3'), (dict(step=5, pct=-.1), 'pct must be a share of training, 0 or more, got -0.1')])
def test_a_time_that_is_none(kw, match):
    model,m = sparse_mlp(),METHOD()
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    for f in (partial(m.step, model, opt), partial(m.update, model, opt), partial(m.before_step, model, opt), m.due, m.needs_dense_grad): refused(partial(f, **kw), match=match, model=model, opt=opt)

def test_intervals_from_numpy():
    import numpy as np
    assert DSTMethod(batches_per_update=np.int64(50)).due(50, total=1000) and DSTMethod(batches_per_update=50, grad_steps=np.int64(3)).grad_steps==3

def test_a_score_is_named_without_its_address():
    def bad(p, **kwargs): return p.sum()
    model = sparse_mlp()
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match=r'^bad must return a tensor of shape'): METHOD(grow_score_f=bad).update(model, opt, 8, total=100)
