"Methods: drop, grow, reset, redistribute, and when"
import copy, math, signal, threading, warnings
from dataclasses import FrozenInstanceError, replace
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai import optimizer as fo
import reference
from helpers import *
from sparsefast import presets, topk
from sparsefast.distributions import uniform_sparsity
from sparsefast.ship.files import load_sparse, save_sparse
from sparsefast.storage import to_sparse_layers
from sparsefast.masks import masked_params, sparse_params, top_k_mask
from sparsefast.memory import memory, remembered
from sparsefast.methods import *
from sparsefast.layer import sparse_layers
from sparsefast.plan import begin_update, target_counts
from sparsefast.training_time import Time
from sparsefast.presets import *
from sparsefast.optim import *
from sparsefast.resets import fill_state, zero_state
from sparsefast.rewire import *
from sparsefast.patterns import *
from sparsefast.schedules import *
from sparsefast.allocation import *
from sparsefast.scores import *
from sparsefast.sparsify import add_mask, sparsify_model

def method(preset='RigL', **kwargs): return DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8, **kwargs})
METHODS = dict(SET=method('SET'), SNFS=method('SNFS'), RigL=method('RigL'),
               step_then_gradient=method('RigL', replaces_step=False),
               momentum_replaces_step=method('SNFS', replaces_step=True, redistribute_f=None, stop_pct=.75))
NEEDS_MOMENTUM = {'SNFS', 'momentum_replaces_step'}
COMBOS = [pytest.param(m, o, id=f'{m}-{o}') for m in METHODS for o in TORCH_OPTS if o in HAS_MOMENTUM or m not in NEEDS_MOMENTUM]

# what the presets mean, with the numbers the reference is given
TABLE = dict(
    SET  = dict(keep_score_f=weight_magnitude, grow_score_f=random_score, initial_drop_grow_pct=.3, batches_per_update=1/50, stop_pct=1.,
                replaces_step=False),
    SNFS = dict(keep_score_f=weight_magnitude, grow_score_f=gradient_momentum, initial_drop_grow_pct=.5, final_drop_grow_pct=.005,
                batches_per_update=1/50, stop_pct=1., replaces_step=False, redistribute_f=importance_redistribution),
    RigL = dict(keep_score_f=weight_magnitude, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.3, batches_per_update=1/12, stop_pct=.75,
                replaces_step=True))

# ------------------------------------------------------------ how much
@pytest.mark.parametrize('T_end,t,f', [(1000,0,.3), (1000,100,.2926584774), (1000,250,.2560660172), (1000,500,.15), (1000,750,.0439339828),
                                       (1000,900,.0073415226), (1000,1000,0), (25000,100,.2999881566), (25000,1000,.2988172052), (25000,18750,.0439339828)])
def test_cosine(T_end, t, f):
    assert cosine_anneal(.3, 0., t/T_end)==pytest.approx(f, abs=5.1e-11)
    assert method().drop_pct(.75*t/T_end)==pytest.approx(f, abs=5.1e-11)                 # of a run whose updates end at 75 %

def test_cosine_with_floor():
    assert method('SNFS').drop_pct(0)==.5 and method('SNFS').drop_pct(1)==pytest.approx(.005) and method('SNFS').drop_pct(.5)==pytest.approx(.2525)

def test_schedule_is_a_setting():
    from fastai.callback.schedule import sched_lin
    assert method(drop_sched_f=sched_lin).drop_pct(.375)==pytest.approx(.15) and method(drop_sched_f=lambda start, end, pos: start).drop_pct(.7)==.3
    assert method().drop_pct(.9)==0 and DSTMethod(**Static_presets).drop_pct(.5)==0      # after the end; and no updates at all

# ------------------------------------------------------------ which
W = torch.tensor([[.5,-.1,.7,.2,.9],[-.3,.05,.4,-.8,.6]], dtype=torch.float64)
M = torch.tensor([[1,1,0,1,0],[1,1,1,0,1]]).bool()
G = torch.tensor([[.01,.02,.90,.03,.80],[.04,.95,.05,.10,.06]], dtype=torch.float64)
VECTOR = [(.3, [[1,0,1,1,0],[1,1,1,0,1]], [(0,2)]), (.5, [[1,0,1,0,1],[1,1,1,0,1]], [(0,2),(0,4)])]

@pytest.mark.parametrize('frac,new,grown', VECTOR, ids=['.3','.5'])
def test_rigl_vector_pure(frac, new, grown):
    mask = drop_grow(M, W.abs(), G.abs(), int(frac*7))                                   # raw values of inactive weights and all
    assert mask.long().tolist()==new and drop_grow(M, (W*M).abs(), G.abs(), int(frac*7)).equal(mask)

SECOND = {'exp_avg_sq', 'max_exp_avg_sq', 'square_avg', 'sqr_avg', 'sum'}                    # names of second moments
STATE_RULES = [zero_state, fill_state]
def after_update(k, v, old, new, rule, grad=None):
    "The optimizer's state `k` after an update, as the reference has it"
    stays,born = old & new,new & ~old
    if k not in SECOND or rule is zero_state: return torch.where(stays, v, 0.)
    flat = lambda t: None if t is None else t.flatten().tolist()
    return v.new_tensor(reference.second_moment(flat(v), flat(stays), flat(born), flat(grad))).view(v.shape)

FIVE_OPTS = {'torch SGD': TORCH_OPTS['momentum'], 'torch Adam': TORCH_OPTS['adam'], 'fastai SGD': partial(fo.SGD, lr=.1, mom=.9),
             'fastai Adam': partial(fo.Adam, lr=.1), 'wrapped AdamW': wrapped(TORCH_OPTS['adamw'])}
@pytest.mark.parametrize('rule', STATE_RULES)
@pytest.mark.parametrize('opt_f', FIVE_OPTS.values(), ids=FIVE_OPTS)
@pytest.mark.parametrize('frac,new,grown', VECTOR, ids=['.3','.5'])
def test_rigl_vector(frac, new, grown, opt_f, rule):
    w,mask,g = (t.to(torch.get_default_device()) for t in (W, M, G))
    m = nn.Linear(5, 2, bias=False, dtype=torch.float64)
    add_mask(m, 'weight', mask.clone())
    opt = opt_f(list(m.parameters()))
    m.weight.grad = torch.ones_like(w)
    opt.step()                                                                           # state everywhere
    state = {k: v.fill_(7.).clone() for k,v in opt_tensors(opt, m.weight).items()}
    m.weight.data.copy_(w)                                                               # raw values at inactive positions are to be ignored
    m.weight.grad = g.clone()
    assert method(initial_drop_grow_pct=frac, reset_state_f=rule).update(m, opt, 8, 0.) is False         # the step is taken
    new = torch.tensor(new).bool()
    assert m.weight_mask.equal(new) and m.weight.detach().equal(torch.where(new & mask, w, 0.)) and m.weight[1,1]==.05
    assert state and all(torch.allclose(v, after_update(k, state[k], mask, new, rule, g), rtol=1e-12, atol=0) for k,v in opt_tensors(opt, m.weight).items())
    assert all(m.weight[i]==0 for i in grown) and m.weight.grad.equal(g)

@given(st.data(), st.integers(1, 30))
def test_drop_grow_equals_reference(data, n):
    draw = lambda e: data.draw(st.lists(e, min_size=n, max_size=n))
    mask,keep,grow = draw(st.booleans()),draw(st.sampled_from([0.,.5,1.,2.])),draw(st.sampled_from([0.,.25,3.]))
    n_drop = data.draw(st.integers(0, sum(mask)))
    n_grow = data.draw(st.none() | st.integers(0, n-sum(mask)+n_drop))
    got = drop_grow(torch.tensor(mask), torch.tensor(keep), torch.tensor(grow), n_drop, n_grow)
    assert got.tolist()==reference.drop_grow(mask, keep, grow, n_drop, n_drop if n_grow is None else n_grow)
    assert int(got.sum())==sum(mask)+(0 if n_grow is None else n_grow-n_drop)

def test_drop_grow_ties_go_to_the_lower_index():
    z = torch.zeros(6)
    assert drop_grow(torch.tensor([1,0,1,1,0,1]).bool(), z, z, 2).tolist()==[True,True,True,True,False,False]
    assert drop_grow(torch.tensor([0,0,0,1,1,1]).bool(), z, z, 1).tolist()==[True,False,False,True,True,False]

# ------------------------------------------------------------ redistribution
@pytest.mark.parametrize('shares,grow', [([.2,.3,.5],[34,47,59]), ([.05,.05,.9],[41,40,59])], ids=str)
def test_snfs_vector(shares, grow):
    "The vector's floors lose one of 140 weights; here it goes to the first layer with room"
    args = shares,[100,100,80],[1000,400,100],[50,50,40]
    assert importance_redistribution(*args)==reference.snfs_growth(*args) and sum(grow)==140
    assert importance_redistribution([7*s for s in shares], *args[1:])==importance_redistribution(*args)  # shares of the sum
    assert importance_redistribution(*args)==grow

@st.composite
def layers(draw):
    L = draw(st.integers(1, 6))
    numel = [draw(st.integers(1, 500)) for _ in range(L)]
    nnz = [draw(st.integers(0, n)) for n in numel]
    frac = draw(st.floats(0, 1))
    return [draw(st.sampled_from([0.,1e-6,.1,.5,1.,30.])) for _ in range(L)],nnz,numel,[int(frac*n) for n in nnz]

@given(layers())
def test_redistribution_keeps_the_total_and_fits(case):
    importance,nnz,numel,n_drop = case
    grow = importance_redistribution(*case)
    assert sum(grow)==sum(n_drop) and all(isinstance(g, int) and 0<=g<=n-a+d for g,n,a,d in zip(grow, numel, nnz, n_drop))

@given(layers())
def test_redistribution_equals_reference(case):
    if sum(case[0])>0: assert importance_redistribution(*case)==reference.snfs_growth(*case)

def test_no_importance_leaves_density_where_it_is(): assert importance_redistribution([0.,0.], [10,10], [20,20], [3,4])==[3,4]

@pytest.mark.parametrize('bad', [math.nan, math.inf], ids=str)
def test_importance_that_is_not_finite(bad):
    with pytest.raises(ValueError, match=f'importance.*{bad}'): importance_redistribution([bad,1.], [10,10], [20,20], [3,4])

def test_redistribution_moves_density_by_momentum():
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['momentum'](model.parameters())
    backward(model, *batches(1)[0]); opt.step()
    with torch.no_grad():
        for k,(_,_,p,mask) in enumerate(masked_params(model)): opt.state[p]['momentum_buffer'].fill_(10. if k==1 else .1)
    before = nnz(model)
    method('SNFS').update(model, opt, 8, .5)
    after = nnz(model)
    assert sum(after)==sum(before) and after[1]>before[1] and after[0]<before[0] and after[2]<before[2]

def test_importance_is_the_mean_over_active_weights():
    model = sparse_mlp(.6)
    opt,seen = TORCH_OPTS['momentum'](model.parameters()),[]
    def spy(importance, *args): return (seen.append((importance, *args)), args[-1])[1]
    plain_loop(model, opt, method('SNFS', batches_per_update=100), total=5)
    bufs = [(opt.state[p]['momentum_buffer'].abs().double(), mask.clone()) for *_,p,mask in masked_params(model)]
    assert all(b[~m].count_nonzero()>0 for b,m in bufs)                                  # inactive ones have momentum, and do not count
    method('SNFS', redistribute_f=spy).update(model, opt, 8, 0.)
    (importance,n_active,numel,n_drop), = seen
    assert importance==pytest.approx([(b[m].mean()).item() for b,m in bufs], rel=1e-5)
    assert n_active==[int(m.sum()) for _,m in bufs] and numel==[m.numel() for _,m in bufs] and n_drop==[n//2 for n in n_active]

# ------------------------------------------------------------ when
@pytest.mark.parametrize('preset,total,every,due', [
    ('RigL', 1000, 100, [100,200,300,400,500,600,700]), ('RigL', 40, 10, [10,20,30]), ('RigL', 41, 10, [10,20,30]), ('RigL', 10, 3, [3,6]),
    ('SET', 40, 10, [10,20,30]), ('SET', 41, 10, [10,20,30,40]), ('SNFS', 12, 4, [4,8]), ('SET', 5, 1, [1,2,3,4]), ('SNFS', 30, 31, [])])
def test_due(preset, total, every, due):
    "Strictly before `stop_pct`, and never on the last step of all"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = method(preset, batches_per_update=every)
    assert [s for s in range(1, total+1) if m.due(s, (s-1)/total)]==due

@pytest.mark.parametrize('step,pct,due', [(100,.74,True), (100,.75,False), (100,.76,False), (99,.5,False), (101,.5,False), (100,.99,False),
                                          (200,.5,True)])
def test_due_is_strict(step, pct, due): assert method(batches_per_update=100).due(step, pct) is due

@given(st.integers(1, 5000), st.data())
def test_only_the_last_step_is_the_last(total, data):
    step = data.draw(st.integers(1, total))
    assert method('SET', batches_per_update=1).due(step, (step-1)/total)==(step<total or total==1)

def test_due_is_pure():
    m = method()
    assert m.due(8, .1) and m.due(8, .1) and not m.due(9, .1) and m==method()

# ------------------------------------------------------------ whole runs against plain Python
@pytest.mark.parametrize('wd', [0., .02], ids=['','wd'])
@pytest.mark.parametrize('preset', PRESETS)
def test_run_equals_reference(preset, wd, n_in=7, n_hid=6, n_out=4, total=45, every=4, lr=.05, mom=.9):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(n_in, n_hid), nn.Tanh(), nn.Linear(n_hid, n_out)).double()
    sparsify_model(model, .55)
    flat = lambda f: [f(m).flatten().tolist() for m in (model[0], model[2])]
    start = flat(lambda m: m.weight.detach()),flat(lambda m: m.weight_mask),flat(lambda m: m.bias.detach())
    data,draws,history = [(torch.randn(5, n_in).double(), torch.randn(5, n_out).double()) for _ in range(total)],{},[]
    def recorded(p, step=None, **kwargs):
        s = random_score(p, **kwargs)
        draws[step, 0 if p is model[0].weight else 1] = s.flatten().tolist()
        return s
    recorded.reads = ()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                                     # an update each four steps
        m = method(preset, batches_per_update=every, **(dict(grow_score_f=recorded) if preset=='SET' else {}))
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=mom, weight_decay=wd)
    for step,(x,y) in enumerate(data, 1):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        m.step(model, opt, step, (step-1)/total)
        if m.due(step, (step-1)/total): history.append(flat(lambda m: m.weight_mask))
    masks,W,B,VW,VB = reference.train(preset, *start, [(x.tolist(), y.tolist()) for x,y in data], every, TABLE[preset]['initial_drop_grow_pct'],
                                      TABLE[preset].get('final_drop_grow_pct', 0.), TABLE[preset]['stop_pct'], lr, mom, wd, lambda *key: draws.get(key, [0.]*99))
    assert history==masks and len(masks)==(8 if preset=='RigL' else 11) and masks[0]!=start[1] and any(a!=b for a,b in zip(masks, masks[1:]))
    close = lambda a, b: torch.testing.assert_close(torch.tensor(a).double(), torch.tensor(sum(b, [])).double(), rtol=0, atol=1e-12)
    close(sum(flat(lambda m: m.weight.detach()), []), W)
    close(sum(flat(lambda m: m.bias.detach()), []), B)
    close(sum(flat(lambda m: opt.state[m.weight]['momentum_buffer']), []), VW)
    close(sum(flat(lambda m: opt.state[m.bias]['momentum_buffer']), []), VB)

# ------------------------------------------------------------ invariants of whole runs
@pytest.mark.parametrize('name,opt', COMBOS)
def test_exact_after_every_step(name, opt):
    m,model = METHODS[name],sparse_mlp(.6)
    optim,before,start,moved = TORCH_OPTS[opt](model.parameters()),nnz(model),masks(model),[]
    hooks_off(model)
    def check(step):
        assert masked_are_zero(model), 'before any forward'
        assert (sum(nnz(model))==sum(before)) if m.redistribute_f else (nnz(model)==before)
        if name not in NEEDS_MOMENTUM:
            assert all((v[~mask]==0).all() for _,_,p,mask in masked_params(model) for v in opt_tensors(optim, p).values())
        if not same_masks(masks(model), moved[-1] if moved else start): moved.append(masks(model))
    plain_loop(model, optim, m, total=40, every_step=check)
    assert len(moved)==(4 if m.stop_pct==1 else 3)

def hooks_off(model):
    for l in model.modules(): l._forward_pre_hooks.clear()

OPTS = {**TORCH_OPTS, 'fastai_sgd': partial(fo.SGD, lr=.1, mom=.9, wd=.01), 'fastai_adam': partial(fo.Adam, lr=.01, wd=.01),
        'wrapped_adamw': wrapped(TORCH_OPTS['adamw'])}
ALL_COMBOS = [pytest.param(m, o, id=f'{m}-{o}') for m in METHODS for o in OPTS if o not in ('sgd','adagrad') or m not in NEEDS_MOMENTUM]
@pytest.mark.parametrize('rule', STATE_RULES)
@pytest.mark.parametrize('name,opt', ALL_COMBOS)
def test_update_touches_only_what_is_new_or_gone(name, opt, rule):
    m,model = replace(METHODS[name], reset_state_f=rule),sparse_mlp(.6)
    optim = OPTS[opt](list(model.parameters()))
    hooks_off(model)
    plain_loop(model, optim, m, total=20)
    backward(model, *batches(21)[20])
    before,old,grads = snapshot(model, optim),masks(model),[p.grad.clone() for _,_,p,_ in masked_params(model)]
    due = dict(step=24, pct=.3)
    assert m.update(model, optim, **due) is not m.replaces_step
    after,stats = snapshot(model, optim),set()
    by_name = {n: i for i,(mod,_,p,_) in enumerate(masked_params(model)) for n,q in model.named_parameters() if q is p}
    for k in before:
        n = k.removeprefix('model.') if k.startswith('model.') else k.removeprefix('opt.').rpartition('.')[0]
        if n not in by_name:
            if not k.endswith('_mask'): assert torch.equal(before[k], after[k]), k       # dense parameters, their state, targets
            continue
        was,now = old[by_name[n]],masks(model)[by_name[n]]
        kept,new,gone = was & now,now & ~was,was & ~now
        stats |= {s for s,t in zip(('kept','new','gone'), (kept,new,gone)) if t.any()}
        assert torch.equal(before[k][kept], after[k][kept])
        if k.startswith('model.'): assert (after[k][~now]==0).all() and (after[k][new]==0).all()
        elif name in NEEDS_MOMENTUM:                                                      # its state stays dense
            assert torch.equal(before[k][~now], after[k][~now])
            assert torch.equal(after[k][new], before[k][new] if k.rpartition('.')[2] in SECOND else torch.zeros_like(after[k][new]))
        else:
            grad = grads[by_name[n]] if 'gradient' in m.reads else None
            assert torch.allclose(after[k], after_update(k.rpartition('.')[2], before[k], was, now, rule, grad), rtol=1e-5, atol=0)
    assert stats=={'kept','new','gone'} and (opt=='sgd' or any(k.startswith('opt.') for k in before))

def test_lookahead_forgets_too():
    "Its slow weights are copied back: they must not revive what was dropped, nor start what is new anywhere but at zero"
    model,m = sparse_mlp(.6),method()
    opt = fo.Lookahead(fo.SGD(list(model.parameters()), lr=.1, mom=.9), k=3)
    def check(step):
        slow = {id(p): s for p,s in zip(model.parameters(), opt.slow_weights.concat())}
        assert masked_are_zero(model)
        if m.due(step, (step-1)/40): assert all((slow[id(p)][~mask]==0).all() for *_,p,mask in masked_params(model))
    plain_loop(model, opt, m, total=40, every_step=check)

# ------------------------------------------------------------ gradients
@pytest.mark.parametrize('name', METHODS)
def test_gradients_on_ordinary_steps(name):
    model,m = sparse_mlp(.6),METHODS[name]
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, m, total=3)
    backward(model, *batches(4)[3])
    dense = [p.grad.clone() for p in model.parameters()]
    assert m.before_step(model, opt, 5, .1) is True
    masks_ = {id(p): mask for *_,p,mask in masked_params(model)}
    for p,g in zip(model.parameters(), dense):
        assert torch.equal(p.grad, g if name in NEEDS_MOMENTUM or id(p) not in masks_ else g*masks_[id(p)])

@pytest.mark.parametrize('name,steps,dense', [('SET',True,False), ('SNFS',True,True), ('RigL',False,True), ('step_then_gradient',True,False),
                                              ('momentum_replaces_step',False,True)])
def test_gradients_on_updates(name, steps, dense):
    "A step sees the gradients of active weights; what an update after it grows by is set aside meanwhile"
    model,m = sparse_mlp(.6),METHODS[name]
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, m, total=3)
    backward(model, *batches(4)[3])
    grads = [p.grad.clone() for p in model.parameters()]
    old = masks(model)
    assert m.before_step(model, opt, 8, .1) is steps and same_masks(masks(model), old) is steps
    weights = [p.grad for p in model.parameters() if p.ndim==2]
    assert all(torch.equal(a.grad, b) for a,b in zip(model.parameters(), grads))==dense
    assert dense or all((g[~mask]==0).all() for g,mask in zip(weights, old))
    if steps:
        opt.step(); m.after_step(model, opt, 8, .1)
        assert not same_masks(masks(model), old)
        assert name!='step_then_gradient' or all(torch.equal(p.grad, g) for p,g in zip(model.parameters(), grads))

def test_growth_by_gradient_uses_inactive_weights():
    model = nn.Linear(6, 1, bias=False)
    add_mask(model, 'weight', torch.tensor([[1,1,1,0,0,0]]).bool())
    model.weight.data.copy_(torch.tensor([[3.,2.,1.,0.,0.,0.]]))
    opt = TORCH_OPTS['sgd'](model.parameters())
    model.weight.grad = torch.tensor([[.1,.1,.1,.2,-5.,.3]])
    m = method(initial_drop_grow_pct=.4)
    assert not m.update(model, opt, 8, 0.) and model.weight_mask.tolist()==[[True,True,False,False,True,False]]

def test_snfs_keeps_dense_momentum():
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, method('SNFS'), total=12)
    assert all(opt.state[p]['momentum_buffer'][~mask].count_nonzero()>0 for *_,p,mask in masked_params(model))

def test_update_in_the_steps_place_changes_no_dense_parameter():
    model = nn.Sequential(nn.Linear(8,6), nn.BatchNorm1d(6), nn.Linear(6,3))
    sparsify_model(model, .5)
    opt,m = TORCH_OPTS['momentum'](model.parameters()),method()
    plain_loop(model, opt, m, total=7)
    backward(model, *batches(1)[0])
    before = snapshot(model, opt)
    m.step(model, opt, 8, .1)
    weights = {f'{a}.{i}.weight{b}' for a,b in (('model',''),('model','_mask'),('opt','.momentum_buffer')) for i in (0,2)}
    assert set(changed(before, snapshot(model, opt)))==weights

# ------------------------------------------------------------ random growth
def set_masks(model=None, seed=0, step=8, noise=None):
    model = sparse_mlp(.6, (8,12,12,12)) if model is None else model
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    if noise is not None: torch.manual_seed(noise); torch.rand(noise)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        method('SET', seed=seed, batches_per_update=1).update(model, opt, step, 0.)
    return masks(model)

def test_random_growth_depends_on_seed_step_and_layer_only():
    state = lambda: torch.get_rng_state()
    a = set_masks(noise=5)
    assert same_masks(a, set_masks(noise=77)) and not same_masks(a, set_masks(seed=1)) and not same_masks(a, set_masks(step=9))
    torch.manual_seed(1)
    model,before = sparse_mlp(.6),state()
    m = method('SET')
    backward(model, *batches(1)[0])
    m.update(model, TORCH_OPTS['sgd'](model.parameters()), 8, 0.)
    assert torch.equal(before, state())                                                  # and draws nothing from the global generator

def test_twin_layers_grow_differently():
    "Identical weights and masks, but another place in the model"
    model = nn.Sequential(nn.Linear(30,30), nn.Linear(30,30))
    sparsify_model(model, .7)
    model[1].load_state_dict(model[0].state_dict())
    for m in model: m.weight.grad = torch.ones(30,30)
    method('SET').update(model, TORCH_OPTS['sgd'](model.parameters()), 8, 0.)
    assert not torch.equal(*masks(model))

def test_freezing_a_layer_does_not_change_what_is_drawn_for_another():
    model = sparse_mlp(.6, (8,12,12,12))
    model[0].weight.requires_grad_(False)
    assert torch.equal(set_masks()[1], set_masks(model)[1])

def test_random_growth_is_uniform(n=300):
    "Over everything not kept, just dropped weights included"
    m,hits = method('SET'),torch.zeros(40)
    for step in range(8, 8*n+1, 8):
        layer = nn.Linear(40, 1, bias=False)
        add_mask(layer, 'weight', (torch.arange(40)<20).view(1,40))
        layer.weight.data.copy_(torch.arange(40., 0, -1).view(1,40)*layer.weight_mask)
        layer.weight.grad = torch.ones(1,40)
        m.update(layer, TORCH_OPTS['sgd'](layer.parameters()), step, 0.)
        hits += layer.weight_mask[0]
    assert (hits[:14]==n).all()                                                          # 30 % of 20 go: these stay
    p = 6/26
    assert ((hits[14:]/n)-p).abs().max() < 5*math.sqrt(p*(1-p)/n)

# ------------------------------------------------------------ frozen, and not finite
@pytest.mark.parametrize('opt', ['momentum','adamw','fastai_sgd'])
@pytest.mark.parametrize('name', METHODS)
def test_frozen_layers_stay_bit_for_bit(name, opt):
    model = sparse_mlp(.6)
    optim = OPTS[opt](list(model.parameters()))
    plain_loop(model, optim, METHODS[name], total=10)
    for p in model[0].parameters(): p.requires_grad_(False)
    mine = lambda: {k: v for k,v in snapshot(model, optim).items() if k.split('.')[1]=='0'}
    before,old = mine(),masks(model)
    plain_loop(model, optim, METHODS[name], total=30)
    assert not changed(before, mine()) and not same_masks(masks(model)[1:], old[1:])

def test_stale_gradient_of_a_frozen_layer_moves_nothing():
    "fastai's optimizers decay the weights of whatever has a gradient, a zero one too"
    model = sparse_mlp(.6)
    opt = fo.SGD(list(model.parameters()), lr=.1, mom=.9, wd=.1)
    backward(model, *batches(1)[0])
    method().step(model, opt, 1, 0.)
    opt.zero_grad()
    model[0].weight.requires_grad_(False)
    before = snapshot(model[0], None)['model.weight']
    for step in (2,8): method().step(model, opt, step, (step-1)/40)
    assert torch.equal(before, model[0].weight)

@pytest.mark.parametrize('name', METHODS)
def test_update_leaves_a_frozen_layer_with_a_stale_gradient_alone(name):
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['momentum'](model.parameters())
    plain_loop(model, opt, METHODS[name], total=3)
    backward(model, *batches(1)[0])
    model[2].weight.requires_grad_(False)
    before = snapshot(model, opt)
    METHODS[name].update(model, opt, 8, .1)
    moved = changed(before, snapshot(model, opt))
    assert 'model.0.weight_mask' in moved and not [k for k in moved if '.2.' in k]

@pytest.mark.parametrize('bad', [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize('where', ['active','inactive'])
@pytest.mark.parametrize('name', METHODS)
def test_non_finite_gradient_skips_update_and_step(name, where, bad):
    model,m = sparse_mlp(.6),METHODS[name]
    opt = TORCH_OPTS['adam'](model.parameters())
    plain_loop(model, opt, m, total=7)
    backward(model, *batches(1)[0])
    p,mask = model[2].weight,model[2].weight_mask
    p.grad[tuple((mask if where=='active' else ~mask).nonzero()[0])] = bad
    before,steps = snapshot(model, opt),opt.state[p]['step'].clone()
    with pytest.warns(UserWarning, match='not finite at optimizer step 8'): m.step(model, opt, 8, .1)
    assert not changed(before, snapshot(model, opt)) and steps==opt.state[p]['step']
    plain_loop(model, opt, m, total=20)                                                  # and goes on
    assert masked_are_zero(model) and not same_masks(masks(model), [before[f'model.{i}.weight_mask'] for i in (0,2,4)])

@pytest.mark.parametrize('bad', [math.inf, math.nan], ids=str)
def test_non_finite_gradient_of_an_inactive_weight_on_an_ordinary_step(bad):
    "For the optimizer it does not exist, so it must not leave anything behind"
    model,twin = sparse_mlp(.6),sparse_mlp(.6)
    for mod in (model, twin):
        opt = TORCH_OPTS['momentum'](mod.parameters())
        backward(mod, *batches(1)[0])
        if mod is model: mod[2].weight.grad[tuple((~mod[2].weight_mask).nonzero()[0])] = bad
        method().step(mod, opt, 1, 0.)
        assert masked_are_zero(mod)
    assert not changed(snapshot(model), snapshot(twin))

# ------------------------------------------------------------ momentum that is not there yet
def test_snfs_without_state_skips_the_update():
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['momentum'](model.parameters())
    backward(model, *batches(1)[0])
    before = snapshot(model, opt)
    assert method('SNFS').update(model, opt, 8, 0.) is True and not changed(before, snapshot(model, opt))

# ------------------------------------------------------------ small fractions, full and empty masks
@pytest.mark.parametrize('frac,moves', [(0.,False), (.04,False), (.5,True), (1.,True)])
def test_fraction_is_truncated(frac, moves):
    model = sparse_mlp(.5, (5,4))                                                        # ten active weights
    backward(model, torch.randn(3,5), torch.tensor([0,1,2]))
    before,m = snapshot(model),method(initial_drop_grow_pct=frac)
    assert m.update(model, TORCH_OPTS['sgd'](model.parameters()), 8, 0.) is False and bool(changed(before, snapshot(model)))==moves and nnz(model)==[10]

@pytest.mark.parametrize('sparsity', [1e-9, 1.], ids=['all','none'])
@pytest.mark.parametrize('name', METHODS)
def test_full_and_empty_masks(name, sparsity):
    model = sparse_mlp(sparsity)
    before = nnz(model)
    plain_loop(model, TORCH_OPTS['momentum'](model.parameters()), METHODS[name], total=20)
    assert nnz(model)==before and masked_are_zero(model)

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', METHODS)
def test_dtypes(name, dtype):
    model = sparse_mlp(.6, dtype=dtype)
    before,start = nnz(model),masks(model)
    plain_loop(model, TORCH_OPTS['momentum'](model.parameters()), METHODS[name], total=20, dtype=dtype)
    assert sum(nnz(model))==sum(before) and masked_are_zero(model) and not same_masks(start, masks(model)) and model[0].weight.dtype==dtype

# ------------------------------------------------------------ the method itself
def test_scores_take_what_they_need_by_name():
    seen = []
    def keep(p, opt, mask, step, pct, generator):
        seen.append((opt, mask.dtype, step, pct, isinstance(generator, torch.Generator)))
        return p.detach().abs()
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    method(keep_score_f=keep).update(model, opt, 16, .25)
    assert seen==[(opt, torch.bool, 16, .25, True)]*3

def test_attributes_are_seen_through_partial():
    m = method('SET', grow_score_f=partial(random_score))
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    m.before_step(model, opt, 8, .1)
    assert all((p.grad[~mask]==0).all() for *_,p,mask in masked_params(model))           # random growth needs no gradient

def test_a_score_that_says_nothing_gets_dense_gradients():
    seen = []
    m = method('SET', grow_score_f=lambda p, **kw: (seen.append(p.grad.clone()), p.grad.abs())[1])
    model = sparse_mlp(.6)
    opt = TORCH_OPTS['sgd'](model.parameters())
    backward(model, *batches(1)[0])
    dense = [p.grad.clone() for *_,p,_ in masked_params(model)]
    assert any(g[~mask].count_nonzero()>0 for g,mask in zip(dense, masks(model)))
    m.step(model, opt, 8, .1)
    assert same_masks(seen, dense)

@pytest.mark.parametrize('as_list', [lambda m: [m], lambda m: [m[0], m[2], m[4]], lambda m: [m[0], m]], ids=['[model]','layers','layer twice'])
def test_modules_may_be_a_list(as_list):
    runs = []
    for f in (lambda m: m, as_list):
        model = sparse_mlp(.6)
        opt = TORCH_OPTS['momentum'](model.parameters())
        for step,(x,y) in enumerate(batches(20), 1):
            backward(model, x, y)
            method().step(f(model), opt, step, (step-1)/20)
        runs.append(snapshot(model, opt))
    assert not changed(*runs)

def test_only_the_modules_given_are_rewired():
    model = sparse_mlp(.6)
    start = masks(model)
    opt = TORCH_OPTS['momentum'](model.parameters())
    for step,(x,y) in enumerate(batches(20), 1):
        backward(model, x, y)
        method().step([model[2]], opt, step, (step-1)/20)
    now = masks(model)
    assert torch.equal(now[0], start[0]) and torch.equal(now[2], start[2]) and not torch.equal(now[1], start[1])

def test_static_keeps_its_masks():
    model = sparse_mlp(.6)
    start,w = masks(model),model[0].weight.detach().clone()
    def check(step): assert masked_are_zero(model)
    plain_loop(model, TORCH_OPTS['momentum'](model.parameters()), DSTMethod(**Static_presets), total=20, every_step=check)
    assert same_masks(start, masks(model)) and not torch.equal(w, model[0].weight)

def test_enforce_brings_weights_and_state_in_line():
    for name,dense in (('RigL',False), ('SNFS',True)):
        model = sparse_mlp(.6)
        opt = TORCH_OPTS['adam'](model.parameters())
        plain_loop(model, opt, METHODS[name], total=3)
        for _,_,p,mask in masked_params(model):
            p.data.fill_(1.)
            for v in opt_tensors(opt, p).values(): v.fill_(2.)
        METHODS[name].enforce(model, opt)
        assert masked_are_zero(model) and all((p[mask]==1).all() for _,_,p,mask in masked_params(model))
        for _,_,p,mask in masked_params(model):
            assert all((v[mask]==2).all() and (v[~mask]==(2 if dense else 0)).all() for v in opt_tensors(opt, p).values())

def test_reset_state_leaves_scalars_alone():
    p = nn.Parameter(torch.ones(2,2))
    opt = TORCH_OPTS['adam']([p])
    p.grad = torch.ones(2,2); opt.step()
    zero_state(p, opt, torch.tensor([[True,False],[False,False]]))
    assert opt.state[p]['step']==1 and (opt.state[p]['exp_avg']==0).tolist()==[[True,False],[False,False]]
    zero_state(nn.Parameter(torch.ones(1)), opt, torch.tensor([True]))                   # nothing known of it
    one = nn.Parameter(torch.ones(1))
    opt = TORCH_OPTS['adam']([one])
    one.grad = torch.ones(1); opt.step()
    zero_state(one, opt, torch.tensor([True]))
    assert opt.state[one]['step']==1

def test_method_is_a_frozen_value():
    m = method()
    with pytest.raises(FrozenInstanceError): m.seed = 3
    assert repr(method('SET'))=='SET(update_every=8)' and repr(DSTMethod(**RigL_presets))=='RigL()' and repr(method(keep_score_f=random_score))=='DSTMethod(keep_score_f=random_score, batches_per_update=8)'
    assert m==method() and m!=method(seed=1) and copy.deepcopy(m)==m

def test_stateless_one_method_serves_two_models():
    m,runs = method('SET'),[]
    for _ in range(2):
        model = sparse_mlp(.6)
        plain_loop(model, TORCH_OPTS['momentum'](model.parameters()), m, total=20)
        runs.append(snapshot(model))
    assert not changed(*runs)

@pytest.mark.parametrize('preset', PRESETS)
def test_resume_from_a_copy_is_the_same_run(preset):
    "Everything a method remembers is in the model and the optimizer"
    def run(stop_at):
        model,m = sparse_mlp(.6),method(preset)
        opt = TORCH_OPTS['momentum'](model.parameters())
        for step,(x,y) in enumerate(batches(40), 1):
            if step==stop_at:
                twin = sparse_mlp(.6, seed=9)
                twin.load_state_dict(model.state_dict())
                twin_opt = TORCH_OPTS['momentum'](twin.parameters())
                twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                model,opt,m = twin,twin_opt,method(preset)
            backward(model, x, y)
            m.step(model, opt, step, (step-1)/40)
        return snapshot(model, opt)
    assert not changed(run(None), run(20))

# ------------------------------------------------------------ presets
@pytest.mark.parametrize('preset', TABLE)
def test_presets(preset):
    "What a preset means, whether or not it spells out a default"
    m = DSTMethod(**PRESETS[preset])
    full = dict(final_drop_grow_pct=0., drop_sched_f=cosine_anneal, redistribute_f=None, seed=0) | TABLE[preset]
    assert {k: getattr(m, k) for k in full}==full and {k: v for k,v in PRESETS[preset].items() if full[k]!=v}=={}

# ------------------------------------------------------------ intervals
@pytest.mark.parametrize('pct', [False, True])
@pytest.mark.parametrize('share,total,every', [(1/12, 40, 3), (.01, 40, 1), (1/4, 60, 15), (1/50, 333, 7)])
def test_a_share_of_training_in_a_loop_of_ones_own(share, total, every, pct):
    "The same as the number of steps that it stands for, at every question about time; so a preset works in a training of any length"
    kw = dict(replaces_step=False, stop_pct=.9, grad_steps=None, sparsity_sched_f=inverse_power_anneal, sparsity_span=(.1, .6))
    a,b = DSTMethod(batches_per_update=share, **kw),DSTMethod(batches_per_update=every, **kw)
    assert a.in_steps(total)==b
    for step in range(1, total+1):
        at = dict(pct=(step-1)/total) if pct else dict(total=total)
        for ask in ('due', 'needs_dense_grad', 'sparsity_pos'):
            if not (pct and step==1): assert getattr(a, ask)(step, **at)==getattr(b, ask)(step, **at), (ask, step)
    assert not a.due(1, pct=0.)                                                                # of how many, nobody knows

@pytest.mark.parametrize('name', ['RigL', 'SET', 'SNFS', 'GMP', 'GraNet', 'RigL_avg', 'SRigL', 'DSR', 'MEST_soft', 'Chase'])
def test_presets_in_a_short_loop_of_ones_own(name):
    "A preset as it is, in sixty steps: bit for bit the training with its interval in steps"
    def run(method):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
        sparsify_model(model, .5, **method.sparsify_kwargs(.5))
        opt,start = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9),masks(model)
        for step,(x,y) in enumerate(batches(60), 1):
            backward(model, x, y)
            method.step(model, opt, step, total=60)
        assert not same_masks(start, masks(model))
        return snapshot(model, opt)
    method = DSTMethod(**getattr(presets, f'{name}_presets'))
    assert not changed(run(method), run(method.in_steps(60)))

@pytest.mark.parametrize('given,total,per_epoch,want', [(100, 1000, 10, 100), (.01, 1000, None, 10), (.5, 1, None, 1), (.0001, 100, 7, 1), (None, 100, 7, 7), (None, 100, 0, 1), (None, 100, None, None)])
def test_interval_in_steps(given, total, per_epoch, want):
    m = DSTMethod(batches_per_update=given, replaces_step=False)
    got = m.in_steps(total, per_epoch)
    assert got.batches_per_update==want and replace(got, batches_per_update=given)==m and (got is m)==(want==given)

@pytest.mark.parametrize('n', [8, 20])
@pytest.mark.parametrize('name', ['RigL', 'RigL_avg', 'SEFT', 'DSR', 'TopKAST'])
def test_a_training_begins_without_what_an_earlier_one_has_left(name, n):
    "A run that was stopped, or ended, and is started again from the same state with a new optimizer"
    method = getattr(presets, name)(**{} if name=='TopKAST' else dict(update_every=5))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    sparsify_model(model, .7, **method.sparsify_kwargs(.7))
    start,ends = copy.deepcopy(model.state_dict()),[]
    for _ in range(2):
        model.load_state_dict(start)
        opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
        for step,(x,y) in enumerate(batches(n), 1):
            backward(model, x, y)
            method.step(model, opt, step, total=20)
        ends.append(snapshot(model, opt))
    assert not changed(*ends)

def test_pruning_layer_by_layer_after_density_has_moved_says_that_it_ends_too_sparse():
    "A layer below its target stays there; pruned as a whole, the model has its number of weights"
    def ended(**kw):
        torch.manual_seed(0)
        model = mlp(8, 24, 20, 3)
        sparsify_model(model, .8, initial_sparsity=.6)
        with torch.no_grad():
            for (_,_,p,mask),n in zip(masked_params(model), (20, 400, 30)): mask.copy_(top_k_mask(p.abs(), n))
        opt = torch.optim.SGD(model.parameters(), lr=.05)
        method = DSTMethod(**{**GMP_presets, 'batches_per_update': 2, **kw})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for step,(x,y) in enumerate(batches(20), 1):
                backward(model, x, y)
                method.step(model, opt, step, total=20)
        return sum(nnz(model)),[str(c.message) for c in caught if 'fewer active weights' in str(c.message)]
    want = round(.2*(8*24+24*20+20*3))
    n,told = ended()
    assert n<want-10 and len(told)==1 and 'prune_share_f=global_share' in told[0]
    n,told = ended(prune_share_f=global_share)
    assert abs(n-want)<=2 and not told

@pytest.mark.parametrize('name', sorted(presets.presets_by_name()))
def test_every_preset_has_an_interval_however_short_the_training(name):
    "A share of few steps is fewer than the gradients that a preset averages"
    m = DSTMethod(**presets.presets_by_name()[name])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for total in (1, 20, 60, 200):
            got = m.in_steps(total, 1)
            assert got.interval>=1 and (got.grad_steps or 1)<=got.interval

# ------------------------------------------------------------ where things are
@pytest.mark.parametrize('preset', [k for k in vars(presets) if k.endswith('_presets')])
@pytest.mark.parametrize('storage', ['masked', 'sparse'])
@pytest.mark.filterwarnings('ignore')
def test_torchs_default_device_is_not_asked(preset, storage, tmp_path, total=24):
    "With another default than where the model is, all goes on as ever: here it is `meta`, on which nothing can be computed"
    settings = {**getattr(presets, preset), **({} if preset=='Static_presets' else dict(batches_per_update=4))}
    if settings.get('grad_steps') is not None: settings['grad_steps'] = 1
    m = DSTMethod(**settings)
    if storage=='sparse' and (m.reads_momentum or m.explore_pct): pytest.skip('not served by sparse layers')
    runs = []
    for default in ('cpu', 'meta'):
        torch.manual_seed(0)
        model,data = mlp(8, 32, 24, 4),batches(total, n_out=4)
        with torch.device(default):
            sparsify_model(model, .5, **m.start(.5), **(dict(sparse_f=uniform_sparsity) if m.pattern_f is nm_pattern else {}))
            opt = TORCH_OPTS['momentum'](model.parameters())
            if storage=='sparse': to_sparse_layers(model, opt, least=0.)
            m.enforce(model, opt)
            for step,(x,y) in enumerate(data, 1):
                backward(model, x, y)
                m.step(model, opt, step, (step-1)/total)
            save_sparse(model, tmp_path/'a.safetensors', opt)
            load_sparse(tmp_path/'a.safetensors', model, opt)
        runs.append(snapshot(model))
    assert not changed(*runs)

# ------------------------------------------------------------ pruning and growth by functions of one's own
def _one_update(method, p=.5, **kw):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    sparsify_model(model, p, **kw)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    model(torch.randn(16, 8)).square().mean().backward()
    before = [m.clone() for *_,m in masked_params(model)]
    weights,grads = [p.detach().clone() for *_,p,_ in masked_params(model)],[p.grad.clone() for *_,p,_ in masked_params(model)]
    method.update(model, opt, 2, total=100)
    return model,before,weights,grads

def test_scheduled_pruning_has_a_score_and_chance_of_its_own():
    "`prune_score_f` says what a schedule prunes, `keep_score_f` what is exchanged, each with random numbers of its own"
    seeds = {}
    def prune(p, generator, **kwargs):
        seeds.setdefault('prune', set()).add(generator.initial_seed())
        return -p.detach().abs()                                                           # the largest go
    def keep(p, generator, **kwargs):
        seeds.setdefault('keep', set()).add(generator.initial_seed())
        return p.detach().abs()
    prune.reads = keep.reads = ('weight',)
    sched = partial(DSTMethod, batches_per_update=2, sparsity_sched_f=lambda a, b, pos: b, sparsity_span=(0., .01), keep_score_f=keep, prune_score_f=prune)
    model,before,weights,_ = _one_update(sched(initial_drop_grow_pct=0.), .5, initial_sparsity=0.)
    for (*_,m),old,w in zip(masked_params(model), before, weights):
        gone,stay = w[old & ~m].abs(),w[m].abs()
        assert len(gone)==m.numel()//2 and gone.min()>=stay.max()
    assert set(seeds)=={'prune'}
    seeds.clear()
    _one_update(sched(initial_drop_grow_pct=.3, grow_score_f=random_score), .5, initial_sparsity=0.)
    assert len(seeds['prune'])==len(seeds['keep'])==2 and not seeds['prune'] & seeds['keep']

def test_growth_is_shared_by_scores():
    "`grow_share_f` sees the grow scores of all weights that are not kept, and what it returns is grown"
    seen = []
    def share(some, total):
        seen.append((sum(len(s) for s in some), total))
        return [0, total]
    model,before,*_ = _one_update(DSTMethod(batches_per_update=2, initial_drop_grow_pct=.25, grow_share_f=share, grow_score_f=gradient_magnitude))
    (a,b),(c,d) = [int(m.sum()) for m in before],[int(m.sum()) for *_,m in masked_params(model)]
    assert seen==[(sum(int((~m).sum()) for m in before)+seen[0][1], seen[0][1])] and seen[0][1]>0 and c<a and d>b and a+b==c+d
    with pytest.raises(ValueError, match='must return growth of'): _one_update(DSTMethod(batches_per_update=2, grow_share_f=lambda some, total: [0, 0]))

def test_grow_scores_and_resets_are_told_what_an_update_does():
    "Grow scores see what is kept; a rule for optimizer state sees what is born, and the gradient where it reads it"
    told,reset = [],[]
    def grow(p, kept, mask, **kwargs):
        told.append((kept.clone(), mask.clone()))
        return p.grad.abs()
    grow.reads = ('gradient',)
    def rule(p, opt, where, born, grad): reset.append((where, born, grad.clone()))
    rule.reads = ('gradient',)
    model,before,_,grads = _one_update(DSTMethod(batches_per_update=2, grow_score_f=grow, reset_state_f=rule))
    after = [m for *_,m in masked_params(model)]
    for old,new,grad,(kept,mask),(where,born,seen) in zip(before, after, grads, told, reset, strict=True):
        assert torch.equal(mask, old) and (kept & ~old).sum()==0 and kept.sum()<old.sum() and (kept & ~new).sum()==0
        assert torch.equal(born, new & ~old) and torch.equal(where, ~(old & new)) and torch.equal(seen, grad)

# ------------------------------------------------------------ an update is written as a whole or not at all
class Fails(TorchDispatchMode):
    "Raises at the `n`-th operation"
    def __init__(self, n): super().__init__(); self.left = n
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt
        return f(*args, **(kwargs or {}))

def everything(model, opt):
    "What an update may change, compressed layers included"
    state = {f'{n}.{k}': v for n,p in model.named_parameters() for k,v in opt.state.get(p, {}).items()}
    return {k: v.clone() for k,v in {**model.state_dict(), **state, **{f'{n}.grad': p.grad for n,p in model.named_parameters()}}.items()}

WHOLE = dict(masked=method(), momentum=method('SNFS'), steps_first=method(replaces_step=False), prunes=DSTMethod(**{**presets.GraNet_presets, 'batches_per_update': 8}),
             remembers=DSTMethod(**{**presets.DSR_presets, 'batches_per_update': 8}), explores=DSTMethod(**{**presets.TopKAST_presets, 'batches_per_update': 8}), compressed=method(), compressed_prunes=DSTMethod(**{**presets.GraNet_presets, 'batches_per_update': 8}))
@pytest.mark.parametrize('name', WHOLE)
def test_an_update_that_fails_anywhere_changes_nothing(name):
    "After each of its operations: masks, weights, targets, optimizer state and what methods remember; and the update can be made again"
    m,model,data = WHOLE[name],nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),batches(9)
    sparsify_model(model, .5, **m.sparsify_kwargs(.5))
    if 'compressed' in name: to_sparse_layers(model, least=0.)
    opt = TORCH_OPTS['adamw'](model.parameters())
    m.enforce(model, opt)
    for step in range(1, 8):
        backward(model, *data[step-1])
        m.step(model, opt, step, total=40)
    first = model,opt
    def started():
        model,opt = copy.deepcopy(first)
        backward(model, *data[7])
        return model,opt
    def run(model, opt):
        if m.before_step(model, opt, 8, total=40): opt.step(), m.after_step(model, opt, 8, total=40)
    done = started()
    run(*done)
    after,n = everything(*done),0
    while True:
        model,opt = started()
        before,n = everything(model, opt),n+1
        try:
            with Fails(n) as mode, torch.no_grad(): m.update(model, opt, 8, total=40)
            break
        except KeyboardInterrupt: assert not changed(before, everything(model, opt)), n
        if n%7: continue
        run(model, opt)
        assert not changed(after, everything(model, opt)), n
        backward(model, *data[8])
        m.step(model, opt, 9, total=40)
    assert n>30

@pytest.fixture
def ctrl_c():
    "Python's own handler, which a shell takes away from what runs in its background"
    had = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, had)

def test_ctrl_c_waits_for_the_end_of_an_update(ctrl_c):
    "Also where it is pressed twice; from a reset rule, in the middle of writing"
    seen = []
    def rule(p, opt, where):
        if len(seen)<4: seen.append(signal.raise_signal(signal.SIGINT))
        zero_state(p, opt, where)
    a,b = sparse_mlp(.6),sparse_mlp(.6)
    for model,f in ((a, zero_state), (b, rule)):
        opt = TORCH_OPTS['momentum'](model.parameters())
        backward(model, *batches(1)[0])
        seen.clear()
        if f is rule:
            with pytest.raises(KeyboardInterrupt): method(reset_state_f=f).update(model, opt, 8, .1)
        else: method().update(model, opt, 8, .1)
    assert len(seen)==3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler and not changed(snapshot(a), snapshot(b))

def test_an_update_in_another_thread_leaves_signals_alone():
    model = sparse_mlp(.6)
    backward(model, *batches(1)[0])
    before,opt = masks(model),TORCH_OPTS['momentum'](model.parameters())
    thread = threading.Thread(target=lambda: method().update(model, opt, 8, .1))
    thread.start(), thread.join()
    assert not same_masks(before, masks(model))

# ------------------------------------------------------------ counts of a schedule
def lowest_share(scores, total, memory): return [total if i==1 else 0 for i in range(len(scores))],None

@pytest.mark.parametrize('over', [-2, -1, 0, 1, 2])
def test_counts_of_a_schedule_shared_among_layers(over):
    "From one weight too many the share is asked, for exactly that many; with none too many it is not"
    asked,model = [],sparse_mlp(.6)
    def share(scores, total, memory): return (asked.append(total), lowest_share(scores, total, memory))[1]
    m = DSTMethod(sparsity_sched_f=lambda start, end, pos: end, prune_share_f=share, batches_per_update=8, initial_drop_grow_pct=0.)
    layers = sparse_layers(model)
    flat = layers[0].mask.view(-1)
    if over>0: flat[(~flat).nonzero()[:over]] = True
    else: flat[flat.nonzero()[:-over]] = False
    active = nnz(model)
    t = Time.of(8, total=100)
    counts = target_counts(m, begin_update(m, layers, None, t), t)
    assert asked==([over] if over>0 else []) and counts==[a-(over if i==1 and over>0 else 0) for i,a in enumerate(active)]

@pytest.mark.parametrize('rises', [False, True])
def test_a_schedule_adds_weights_only_where_it_rises(rises):
    def sched(start, end, pos): return end
    sched.rises = rises
    model = sparse_mlp(.6)
    layers,want = sparse_layers(model),nnz(model)
    for i,l in enumerate(layers): l.mask.view(-1)[l.mask.view(-1).nonzero()[:3]] = False
    t = Time.of(8, total=100)
    for share in (None, lowest_share):
        m = DSTMethod(sparsity_sched_f=sched, prune_share_f=share, batches_per_update=8, initial_sparsity=.1)
        assert target_counts(m, begin_update(m, layers, None, t), t)==(want if rises else nnz(model))

# ------------------------------------------------------------ what selection costs
def test_a_sample_guesses_a_few_more_than_asked():
    "So that one pass and a small selection do"
    t = torch.rand(1<<18, generator=torch.Generator().manual_seed(0))
    for k in (100, 5000, 100000): assert k<=int((t>topk._guess(t, k, None, len(t))).sum())<=1.3*k+1000

def test_selection_from_pieces_holds_few_candidates(monkeypatch):
    "Of the scores of a layer, at most two times what is selected, and a piece"
    seen,reduce = [],topk._reduce
    def watched(scores, at, k): return (seen.append(sum(map(len, scores))), reduce(scores, at, k))[1]
    monkeypatch.setattr(topk, '_reduce', watched)
    t = torch.arange(10000.)
    mask = topk.top_k_mask(t.split(100), 100, among=torch.ones(10000, dtype=torch.bool))
    assert mask.nonzero().squeeze(1).tolist()==list(range(9900, 10000)) and max(seen)<=300 and len(seen)>30

def test_a_layer_that_was_empty_already_gives_no_warning(recwarn):
    "Only one that loses its last weight does"
    model = sparse_mlp(.6)
    model[0].weight_mask.zero_()
    backward(model, *batches(1)[0])
    method().update(model, TORCH_OPTS['sgd'](model.parameters()), 8, .1)
    assert not [w for w in recwarn if 'removed every weight' in str(w.message)] and not model[0].weight_mask.any()

# ------------------------------------------------------------ an optimizer that fails at a step that an update follows
def test_a_step_that_fails_leaves_no_gradient_in_the_state():
    "The copy of the dense gradient is no part of a saved state, and is gone after the next update; an earlier version's state that has it loads"
    class Broken(torch.optim.SGD):
        def step(self, closure=None): raise RuntimeError('out of memory')
    model = sparse_mlp()
    names,m = set(model.state_dict()),method(replaces_step=False)
    backward(model, *batches(1)[0])
    with pytest.raises(RuntimeError, match='out of memory'): m.step(model, Broken(model.parameters(), lr=.1), 8, total=40)
    assert 'dense' in remembered(model[0].weight) and 'dense' not in memory(model[0].weight) and set(model.state_dict())==names
    sparse_mlp().load_state_dict(model.state_dict())
    old = {**model.state_dict(), '0.weight_dst_dense': torch.ones(24, 8)}
    other = sparse_mlp()
    other.load_state_dict(old)
    for net in (model, other):
        backward(net, *batches(1)[0])
        m.step(net, torch.optim.SGD(net.parameters(), lr=.1), 16, total=40)
        assert set(net.state_dict())==names and 'dense' not in remembered(net[0].weight)
