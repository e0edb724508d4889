"New weights under adaptive optimizers: what their state starts from, and how long their first steps are"
import copy
from dataclasses import replace
from functools import lru_cache, partial
import pytest, torch
import fastai.optimizer as fo
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop
import reference
from helpers import *
from sparsefast.exploration import ExploringLayer
from sparsefast.gradients import average_gradients, sum_gradients
from sparsefast.layer import sparse_layers
from sparsefast.methods import DSTMethod
from sparsefast.optim import opt_state
from sparsefast.presets import RigL_avg_presets, RigL_presets, SET_presets, SNFS_presets, TopKAST_presets
from sparsefast.resets import call_reset, fill_state, zero_state
from sparsefast.sparsify import add_mask, sparsify_model
from sparsefast.storage import to_sparse_layers
from sparsefast.training_time import Time

lr = 1e-3
def method(preset=RigL_presets, **kwargs): return DSTMethod(**{**preset, 'batches_per_update': 8, **kwargs})

# ------------------------------------------------------------ the length of first steps
@lru_cache
def after_steps(make, T):
    "A layer with six of eight weights, and its optimizer, after `T` steps with gradients of 1"
    model = nn.Linear(4, 2, bias=False, dtype=torch.float64)
    add_mask(model, 'weight', torch.tensor([[1,1,1,0],[1,1,1,0]]).bool())
    w,start = model.weight,torch.tensor([[.5,-.6,.7,0],[-.8,.9,.1,0]]).double()
    opt = make([w])
    for _ in range(T):
        w.data.copy_(start)
        w.grad = model.weight_mask.double()
        opt.step()
    w.data.copy_(start)
    return model,opt

def first_steps(make, T, rho=1., rule=fill_state, n=20, total=10**6):
    """Steps of a weight grown after `T` steps, and of one that was always there, in learning rates

    Every gradient is 1, that of the new weight `rho`. The smallest of six weights goes, and the update grows the weight with the only other gradient"""
    model,opt = copy.deepcopy(after_steps(make, T))
    w = model.weight
    w.grad = model.weight_mask.double()
    w.grad[1,2],w.grad[0,3] = 0.,rho
    method(batches_per_update=1, initial_drop_grow_pct=.2, reset_state_f=rule).update(model, opt, T+1, total=total)
    assert model.weight_mask.tolist()==[[True,True,True,True],[True,True,False,False]] and w[0,3]==0
    new,old = [],[]
    for _ in range(n):
        before = w.detach().clone()
        w.grad = model.weight_mask.double()
        w.grad[0,3] = rho
        opt.step()
        moved = (w.detach()-before).abs()/lr
        new.append(moved[0,3].item()), old.append(moved[0,0].item())
    return new,old

@pytest.mark.parametrize('rho', [1., 3.])
@pytest.mark.parametrize('T,want', [(10_000, [.1, .19, .6513, .8784]), (10, [.1457, .2648, .7415, .9173])])
def test_first_steps_under_adamw(T, want, rho):
    "Shorter than a learning rate and growing with the first moment, however late, and however large the gradient that grew it"
    new,_ = first_steps(OPTS['adamw'], T, rho)
    assert [new[i-1] for i in (1, 2, 10, 20)]==pytest.approx(want, abs=2e-4)            # weight decay costs a little

def test_by_default_state_starts_at_zero():
    "Its steps are then several times longer than others"
    new,_ = first_steps(OPTS['adamw'], 10_000, rule=DSTMethod().reset_state_f)
    assert [new[i-1] for i in (1, 2, 10, 20)]==pytest.approx([3.162, 4.250, 6.528, 6.241], abs=2e-3)

opt_of = lambda f, **kw: lambda ps: f(ps, lr=lr, **kw)
OPTS = dict(sgd=opt_of(SGD), adam=opt_of(Adam), amsgrad=opt_of(Adam, amsgrad=True), adam_foreach=opt_of(Adam, foreach=True), adam_fused=opt_of(Adam, fused=True),
            adamw=opt_of(AdamW), adamw_amsgrad=opt_of(AdamW, amsgrad=True), adamw_foreach=opt_of(AdamW, foreach=True), adamw_fused=opt_of(AdamW, fused=True),
            nadam=opt_of(NAdam), nadam_foreach=opt_of(NAdam, foreach=True), radam=opt_of(RAdam), radam_foreach=opt_of(RAdam, foreach=True),
            rmsprop=opt_of(RMSprop), rmsprop_centered=opt_of(RMSprop, centered=True), rmsprop_foreach=opt_of(RMSprop, foreach=True),
            adadelta=opt_of(Adadelta), adadelta_foreach=opt_of(Adadelta, foreach=True), adagrad=opt_of(Adagrad), adagrad_fused=opt_of(Adagrad, fused=True),
            adamax=opt_of(Adamax), adamax_foreach=opt_of(Adamax, foreach=True), rprop=opt_of(Rprop, step_sizes=(1e-6, lr)), rprop_foreach=opt_of(Rprop, step_sizes=(1e-6, lr), foreach=True))
FASTAI = dict(fastai_sgd=fo.SGD, fastai_adam=fo.Adam, fastai_rmsprop=fo.RMSProp, fastai_radam=fo.RAdam, fastai_lamb=fo.Lamb, fastai_qhadam=fo.QHAdam, ranger=fo.ranger)
OPTS |= {k: partial(lambda f, ps: f(ps, lr=lr, wd=0.), f) for k,f in FASTAI.items()}
OPTS['lookahead'] = lambda ps: fo.Lookahead(fo.Adam(ps, lr=lr, wd=0.))
OPTS['wrapped'] = lambda ps: fo.OptimWrapper(ps, lr=lr, opt=AdamW)
FIRST = dict(rmsprop=1., nadam=.48, radam=.08, adagrad=.0224, fastai_adam=.1, amsgrad=.1, adam_fused=.1, adam_foreach=.1)

@pytest.mark.parametrize('rho', [1., 3., 10.])
@pytest.mark.parametrize('opt', OPTS)
def test_no_optimizer_takes_long_first_steps(opt, rho):
    "In the mean of 20 steps at most 1.5 learning rates, and 1.5 times what a weight takes that was always there"
    new,old = first_steps(OPTS[opt], 2000, rho)
    if 'sgd' not in opt: assert sum(new)/20 <= 1.5 and sum(new) <= 1.5*sum(old)
    else: assert sum(new)==pytest.approx(rho*sum(old), rel=1e-9)
    assert sum(new)>0.2                                                                   # nor does the weight stand still
    if opt in FIRST and rho==1: assert new[0]==pytest.approx(FIRST[opt], abs=.005)

# ------------------------------------------------------------ the state itself
def _state(n, **slots):
    p = nn.Parameter(torch.zeros(n))
    opt = AdamW([p])
    opt.state[p] = {k: torch.tensor(v) for k,v in slots.items()}
    return p,opt

POWERS = dict(exp_avg_sq=2, max_exp_avg_sq=2, square_avg=2, sqr_avg=2, sum=2, variance=2, exp_inf=1, acc_delta=0, step_size=0)
@pytest.mark.parametrize('grad', [None, [1.,-2.,6.,.5,-1000.,3.]])
def test_each_second_moment_follows_the_reference(grad):
    v = [.5,.25,.125,8.,16.,2.]
    where,born = torch.tensor([0,0,1,1,1,0]).bool(),torch.tensor([0,0,1,0,1,0]).bool()
    p,opt = _state(6, exp_avg=v, step=100., **{k: v for k in POWERS})
    fill_state(p, opt, where, born=born, grad=None if grad is None else torch.tensor(grad))
    state = opt_state(opt, p)
    assert state['exp_avg'].tolist()==[.5,.25,0,0,0,2.] and state['step']==100
    for k,power in POWERS.items():
        want = reference.second_moment(v, (~where).tolist(), born.tolist(), grad, power)
        assert state[k].tolist()==pytest.approx(want, rel=1e-6), k
        assert state[k][3]==0 and [state[k][i].item() for i in (0, 1, 5)]==[.5,.25,2.]
    if grad: assert state['sum'][4]/1e4==pytest.approx(2.75/3)                            # at most a hundred times the gradient counts

def test_weights_that_nothing_stays_beside_start_at_zero():
    p,opt = _state(3, exp_avg=[1.,1.,1.], exp_avg_sq=[1.,2.,3.])
    every = torch.ones(3, dtype=torch.bool)
    fill_state(p, opt, every, born=every, grad=torch.ones(3))
    assert not opt_state(opt, p)['exp_avg_sq'].any()

@pytest.mark.parametrize('grad', [[0.,0.,5.], [1e-30,1e-30,1.], [1e30,1e30,1e30]])
def test_gradients_out_of_range_change_nothing(grad):
    "Zero where weights stay, or squares that underflow or overflow: the mean alone counts"
    p,opt = _state(3, exp_avg_sq=[1.,3.,0.])
    born = torch.tensor([False,False,True])
    fill_state(p, opt, born, born=born, grad=torch.tensor(grad))
    assert opt_state(opt, p)['exp_avg_sq'].tolist()==[1.,3.,2.]

def test_without_growth_state_is_only_zeroed():
    "As where a checkpoint is brought in line with its masks"
    p,opt = _state(3, exp_avg=[1.,1.,1.], exp_avg_sq=[1.,2.,3.])
    fill_state(p, opt, torch.tensor([False,True,False]))
    assert [opt_state(opt, p)[k].tolist() for k in ('exp_avg', 'exp_avg_sq')]==[[1,0,1],[1,0,3]]

@pytest.mark.parametrize('rule', [fill_state, partial(call_reset, zero_state)])
def test_dense_second_moments_stay(rule):
    "A weight that had gradients while it was masked keeps the second moment they have given it"
    p,opt = _state(3, exp_avg=[1.,1.,1.], exp_avg_sq=[1.,7.,3.])
    born = torch.tensor([False,True,False])
    rule(p, opt, born, born=born, dense_state=True)
    assert [opt_state(opt, p)[k].tolist() for k in ('exp_avg', 'exp_avg_sq')]==[[1,0,1],[1,7,3]]

def test_means_of_bf16_state_are_taken_in_float32():
    "A mean rounded to bf16 before it is scaled would be another number"
    v = torch.tensor([1.,1.0078125,1.0078125,0.], dtype=torch.bfloat16)
    p,opt = _state(4)
    opt.state[p] = {'exp_avg_sq': v}
    born = torch.tensor([False,False,False,True])
    fill_state(p, opt, born, born=born, grad=torch.tensor([1.,1.,1.,1.2]))
    want = torch.tensor(reference.second_moment(v.tolist(), (~born).tolist(), born.tolist(), [1.,1.,1.,1.2])[3])
    early = (v[:3].sum()/3)*torch.tensor(1.2, dtype=torch.bfloat16)**2
    assert v[3]==want.bfloat16() and v.dtype==torch.bfloat16 and v[3]!=early

# ------------------------------------------------------------ in training
@pytest.mark.parametrize('rule', [fill_state, zero_state])
@pytest.mark.parametrize('opt', sorted(OPTS.keys()-{'rprop', 'rprop_foreach'}))
def test_masked_weights_have_no_state(opt, rule):
    "Rprop apart, which has a least step size everywhere, state stays zero where weights are masked; Adamax adds 1e-8"
    model,seen = sparse_mlp(.6),[]
    optim = OPTS[opt](list(model.parameters()))
    def check(step):
        for _,_,p,mask in masked_params(model):
            assert all((t[~mask].abs()<=(1e-8 if 'adamax' in opt else 0.)).all() for t in opt_tensors(optim, p).values())
        seen.append(masks(model))
        assert masked_are_zero(model)
    plain_loop(model, optim, method(reset_state_f=rule), 40, check)
    assert not same_masks(seen[0], seen[-1])

@pytest.mark.parametrize('opt', ['rprop', 'rprop_foreach'])
def test_rprop_moves_filled_weights(opt):
    model = sparse_mlp(.6)
    optim = OPTS[opt](list(model.parameters()))
    start = masks(model)
    plain_loop(model, optim, method(reset_state_f=fill_state), 40, lambda step: masked_are_zero(model) or pytest.fail('not masked'))
    grown = [p[mask & ~old].abs() for old,(_,_,p,mask) in zip(start, masked_params(model))]
    assert torch.cat(grown).median()>lr

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'nesterov'])
def test_sgd_is_unchanged_to_the_bit(opt, preset):
    if preset=='SNFS' and opt=='sgd': return
    runs = []
    for rule in (fill_state, zero_state):
        model = sparse_mlp(.6)
        optim = TORCH_OPTS[opt](model.parameters())
        plain_loop(model, optim, method(PRESETS[preset], reset_state_f=rule), 60)
        runs.append(snapshot(model, optim))
    assert not changed(*runs)

def test_adam_is_changed():
    runs = []
    for rule in (fill_state, zero_state):
        model = sparse_mlp(.6)
        plain_loop(model, TORCH_OPTS['adamw'](model.parameters()), method(reset_state_f=rule), 60)
        runs.append(snapshot(model))
    assert changed(*runs)

def _started(m, opt='adamw', compressed=False, steps=7, grad=True):
    "A model and its optimizer, with the gradients of the step whose update is due"
    torch.manual_seed(0)
    model = mlp(8, 24, 20, 3, dtype=torch.float64)
    sparsify_model(model, .6, **m.sparsify_kwargs(.6))
    if compressed: to_sparse_layers(model, least=0.)
    optim = TORCH_OPTS[opt](model.parameters())
    m.enforce(model, optim)
    for step,(x,y) in enumerate(batches(steps, dtype=torch.float64), 1):
        backward(model, x, y)
        m.step(model, optim, step, total=100)
    backward(model, *batches(8, dtype=torch.float64)[7])
    return model,optim

RULES = dict(rigl=method(), averaged=method({**RigL_avg_presets, 'redistribute_f': None}, grad_steps=3), set=method(SET_presets), rigl_after_the_step=method(replaces_step=False))
@pytest.mark.parametrize('name', RULES)
def test_compressed_layers_know_the_same_gradients(name):
    "A rule that takes gradients gets them for new weights of a compressed layer as for those of a masked one: those that growth has read, or none"
    told = []
    def rule(p, opt, where, born=None, grad=None, **kwargs):
        told.append((grad, born))
        fill_state(p, opt, where, born, grad, **kwargs)
    m,runs = replace(RULES[name], reset_state_f=rule),[]
    for compressed in (False, True):
        told.clear()
        model,optim = _started(m, compressed=compressed)
        if m.before_step(model, optim, 8, total=100): optim.step(), m.after_step(model, optim, 8, total=100)
        new = [l.mask for l in sparse_layers(model)]
        told_now = told[-len(new):]
        wide = lambda t, k: t if t is None else t[k] if t.shape==k.shape else t
        runs.append((new, [wide(g, k) for (g,_),k in zip(told_now, new)], [wide(b, k) for (_,b),k in zip(told_now, new)],
                     [(lambda v: v[l.mask] if v.dim()>1 else v)(opt_state(optim, l.p)['exp_avg_sq']) for l in sparse_layers(model)]))
    for a,b in zip(*runs):
        assert all((s is None and t is None) or torch.allclose(s.double(), t.double(), rtol=1e-9, atol=1e-12) for s,t in zip(a, b))
    assert (runs[0][1][0] is None)==(name=='set') and any(b.any() for b in runs[0][2])

def test_the_rule_makes_no_dense_gradients():
    "A method that grows by chance has none at hand, and the rule does without; one that says it reads them gets them"
    m = method(SET_presets)
    model,optim = _started(m, compressed=True)
    assert not m.needs_dense_grad(8, total=100) and not any(l.module._held for l in sparse_layers(model))
    m.step(model, optim, 8, total=100)
    seen = []
    def rule(p, opt, where, grad=None): seen.append(grad)
    rule.reads = ('gradient',)
    m = replace(m, reset_state_f=rule)
    assert m.needs_dense_grad(8, total=100) and not m.needs_dense_grad(7, total=100)
    model,optim = _started(m, compressed=True)
    m.step(model, optim, 8, total=100)
    assert [len(g) for g in seen]==[len(l.p) for l in sparse_layers(model)]

def test_weights_that_start_to_train_outside_the_mask():
    "In an exploring layer a weight is born when it begins to train"
    m = method(TopKAST_presets, initial_drop_grow_pct=.5, stop_pct=1., reset_state_f=fill_state)
    model,optim = _started(m)
    layers = [ExploringLayer.of(l, m.explore_pct) for l in sparse_layers(model)]
    assert m.before_step(model, optim, 8, total=100)
    optim.step()
    old = [l.recall('trains').clone() for l in layers]
    before = [{k: v.clone() for k,v in opt_tensors(optim, l.p).items()} for l in layers]
    m.after_step(model, optim, 8, total=100)
    n_born = 0
    for l,was,state in zip(layers, old, before):
        now = l.recall('trains')
        stays,born = was & now,now & ~was
        n_born += int(born.sum())
        after = opt_tensors(optim, l.p)
        want = reference.second_moment(*(t.flatten().tolist() for t in (state['exp_avg_sq'], stays, born)))
        assert after['exp_avg_sq'].flatten().tolist()==pytest.approx(want, rel=1e-12)
        assert torch.equal(after['exp_avg'], torch.where(stays, state['exp_avg'], 0.))
    assert n_born

def test_a_weight_that_returns_keeps_its_state():
    "Dropped and grown by one update, it was there before and after"
    m = method(grow_score_f=lambda p, **kwargs: p.detach().abs(), keep_score_f=lambda p, **kwargs: p.detach().abs())
    model,optim = _started(m)
    before = snapshot(model, optim)
    m.before_step(model, optim, 8, total=100)
    assert not changed(before, snapshot(model, optim))                                    # the largest of what was dropped return: all

# ------------------------------------------------------------ averaged gradients
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_are_summed_in_float32(dtype):
    "Many small gradients after a large one: in bf16 a sum would stay at the first"
    model = nn.Linear(4, 2, dtype=dtype)
    sparsify_model(model, .5)
    layers,m = sparse_layers(model),DSTMethod(**{**RigL_presets, 'batches_per_update': 65}, grad_steps=None)
    for step in range(1, 65):
        model.weight.grad = torch.full((2, 4), 1. if step==1 else 2**-10, dtype=dtype)
        sum_gradients(m, layers, Time.of(step, total=1000))
    assert layers[0].recall('grad').dtype==torch.promote_types(dtype, torch.float32)
    average_gradients(m, layers)
    mean = layers[0].recall('grad')
    assert mean.dtype==dtype and torch.equal(mean, torch.full((2, 4), (1+64*2**-10)/65, dtype=dtype))
    m.update(model, torch.optim.SGD(model.parameters(), lr=.1), 65, total=1000)
