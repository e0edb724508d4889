"Every preset: the budget it promises, what it does to weights and optimizer, and the same as a plain-Python reference"
import copy, inspect, math, warnings
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
import reference
from helpers import *
from sparsefast import presets
from sparsefast.allocation import *
from sparsefast.distributions import uniform_sparsity
from sparsefast.masks import masked_params, n_active, sparse_params
from sparsefast.methods import DSTMethod
from sparsefast.patterns import *
from sparsefast.presets import *
from sparsefast.rewire import rewire, sparse_layers
from sparsefast.schedules import *
from sparsefast.optim import *
from sparsefast.scores import *
from sparsefast.sparsify import sparsify_model
from sparsefast.utils import show_value
from sparsefast.training_time import Time

CATALOGUE = {k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}
DYNAMIC   = [k for k in CATALOGUE if k!='Static']
SCHEDULED = ['GMP', 'GMP_lm', 'GraNet', 'GraNet_half', 'ACDC', 'MEST_soft']
STORED    = ['TopKAST', 'SR_STE']
SCHEDULED += ['CHTss']
FIXED     = [k for k in DYNAMIC if k not in SCHEDULED+['SRigL', 'Chase']]
NM        = partial(nm_pattern, n=2, m=4)

def preset(name, every=5, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                                        # of intervals this short
        if (CATALOGUE[name].get('grad_steps') or 0)>every: kwargs = {'grad_steps': every, **kwargs}
        return DSTMethod(**{**CATALOGUE[name], 'batches_per_update': every, **kwargs})

def net(seed=0, sizes=(8,24,20,4)):
    torch.manual_seed(seed)
    return mlp(*sizes)

def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (4,2,1)), nn.Conv2d(4, 8, (2,1)), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

def started(model, m, sparsity=.5, **kwargs):
    sparsify_model(model, sparsity, **{**m.start(sparsity), **kwargs})
    return model

def momentum_sgd(model, **kwargs): return torch.optim.SGD(model.parameters(), **{**dict(lr=.05, momentum=.9, weight_decay=1e-2), **kwargs})

def trained(model, m, total=40, every_step=noop, opt=None):
    opt = opt or momentum_sgd(model)
    plain_loop(model, opt, m, total, every_step)
    return opt

# ------------------------------------------------------------ what each is made of
def test_presets_are_what_their_papers_say():
    "Every value that differs from RigL's, written down a second time: `spec.md` 1 and 2, and its sources"
    e,cubic = dict(keep_score_f=weight_magnitude), inverse_power_anneal
    later = dict(stop_pct=1., replaces_step=False)
    top = dict(e, grow_score_f=weight_magnitude, initial_drop_grow_pct=1., drop_sched_f=constant_anneal, batches_per_update=1, explore_pct=.1, penalty_f=exploration_penalty, **later)
    granet = dict(e, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.5, final_drop_grow_pct=.005, batches_per_update=1/50, sparsity_sched_f=cubic, sparsity_span=(0., .5), prune_share_f=global_share, **later)
    itop = dict(e, initial_drop_grow_pct=.5, final_drop_grow_pct=.005, **later)
    rigl = dict(e, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.3, batches_per_update=1/12, stop_pct=.75, replaces_step=True)
    want = dict(
        Static       = dict(initial_drop_grow_pct=0., batches_per_update=1, stop_pct=0.),
        SET          = dict(e, grow_score_f=random_score, initial_drop_grow_pct=.3, batches_per_update=1/50, **later),
        SET_original = dict(keep_score_f=per_sign_magnitude, grow_score_f=random_score, initial_drop_grow_pct=.3, drop_sched_f=constant_anneal, grow_value_f=random_value, **later),
        SNFS         = dict(e, grow_score_f=gradient_momentum, initial_drop_grow_pct=.5, final_drop_grow_pct=.005, batches_per_update=1/50, redistribute_f=importance_redistribution, **later),
        RigL         = rigl,
        SET_ITOP     = dict(itop, grow_score_f=random_score, batches_per_update=1/50),
        RigL_ITOP    = dict(itop, grow_score_f=gradient_magnitude, batches_per_update=1/25),
        DSR          = dict(e, grow_score_f=random_elsewhere, initial_drop_grow_pct=.14, drop_sched_f=constant_anneal, batches_per_update=1/50, stop_pct=.95, replaces_step=False,
                            drop_share_f=adaptive_threshold_share, redistribute_f=survivor_redistribution),
        MEST         = dict(e, grow_score_f=random_score, initial_drop_grow_pct=.2, batches_per_update=1/32, drop_sched_f=step_anneal, **later),
        MEST_soft    = dict(e, grow_score_f=random_score, initial_drop_grow_pct=1/6, batches_per_update=1/32, drop_sched_f=step_anneal, sparsity_sched_f=step_anneal, initial_sparsity=density_times, **later),
        TopKAST      = top,
        GMP          = dict(e, initial_drop_grow_pct=0., batches_per_update=1/100, sparsity_sched_f=cubic, sparsity_span=(0., .75), **later),
        GMP_lm       = dict(e, initial_drop_grow_pct=0., batches_per_update=1/100, sparsity_sched_f=cubic, sparsity_span=(.25, .75), **later),
        GraNet       = granet,
        GraNet_half  = dict(granet, initial_sparsity=.5),
        Chase        = dict(e, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.5, final_drop_grow_pct=.005, batches_per_update=1/50, drop_sched_f=late_cosine_anneal, drop_share_f=global_share,
                            grow_share_f=global_growth, prune_share_f=global_share, sparsity_sched_f=constant_anneal, initial_sparsity=1., extra_density_f=spare_density, **later),
        ACDC         = dict(e, initial_drop_grow_pct=0., batches_per_update=.01, sparsity_sched_f=square_wave, prune_share_f=global_share, **later),
        SRigL        = dict(rigl, pattern_f=fan_in_pattern),
        SR_STE       = dict(top, explore_pct=1., penalty_f=sr_ste_penalty, pattern_f=nm_pattern),
        RigL_avg     = dict(keep_score_f=magnitude_no_empty_rows, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.5, batches_per_update=1/12, redistribute_f=importance_redistribution, grad_steps=None, **later))
    chts = dict(keep_score_f=CHTs_presets['keep_score_f'], grow_score_f=CHTs_presets['grow_score_f'], initial_drop_grow_pct=.3, batches_per_update=1/12, stop_pct=.75, replaces_step=True)
    want |= dict(
        CHTs         = chts,
        CHTss        = dict(chts, sparsity_sched_f=sigmoid_anneal, initial_sparsity=.5, sparsity_span=(0., .75), prune_score_f=relative_importance),
        GSE          = dict(e, grow_score_f=GSE_presets['grow_score_f'], initial_drop_grow_pct=.2, batches_per_update=1/50, stop_pct=.6, replaces_step=False, drop_share_f=global_share, grow_share_f=global_growth),
        SEFT         = dict(keep_score_f=sensitivity, grow_score_f=gradient_magnitude, initial_drop_grow_pct=.2, batches_per_update=1/20, grad_steps=5, **later))
    assert [show_value(f) for f in (chts['keep_score_f'], chts['grow_score_f'], GSE_presets['grow_score_f'])]==['_sampled(score_f=weight_magnitude, gamma=linear_anneal(1.0, 3.6666666666666665))',
        '_sampled(score_f=ch2_l3n, gamma=1.0)', '_in_subset(score_f=gradient_magnitude, subset_f=uniform_subset)']
    assert want.keys()==CATALOGUE.keys()
    for name,values in want.items(): assert DSTMethod(**values)==DSTMethod(**CATALOGUE[name]), name

def test_defaults_of_what_presets_name():
    "Numbers that are defaults of functions: phases of AC/DC's code, MEST's steps and bound, SR-STE's scale, 2:4, SRigL's threshold"
    default = lambda f, k: inspect.signature(f).parameters[k].default
    assert default(square_wave, 'at')==(*(i/100 for i in range(10, 80, 5)), .85) and default(step_anneal, 'at')==(90/160, 120/160) and default(density_times, 'by')==1.2
    assert default(sr_ste_penalty, 'scale')==2e-4 and (default(nm_pattern, 'n'), default(nm_pattern, 'm'))==(2, 4) and default(fan_in_pattern, 'ablate')==.3 and default(inverse_power_anneal, 'power')==3

# ------------------------------------------------------------ all of them
@pytest.mark.parametrize('make', [net, convnet])
@pytest.mark.parametrize('name', list(CATALOGUE))
def test_masked_means_zero_after_every_step(name, make):
    "Weights outside the mask are zero; so is the optimizer's state outside what trains, but for SNFS; patterns hold"
    m = preset(name)
    model = started(make(), m)
    opt,moved = momentum_sgd(model),set()
    hooks = [h for mod in model.modules() for h in mod._forward_pre_hooks.values()]
    for mod in model.modules(): mod._forward_pre_hooks.clear()                               # the engine has to do without
    first = masks(model)
    def look(step):
        for l in sparse_layers(model):
            trains = l.mask if l.recall('trains') is None else l.recall('trains')
            assert (l.p[~l.mask]==0).all()
            if name!='SNFS': assert all((t[~trains]==0).all() for t in opt_tensors(opt, l.p).values())
            if m.pattern_f is not drop_grow: assert fits_pattern(l.mask, m.pattern_f)
        if not same_masks(first, masks(model)): moved.add(step)
    trained(model, m, every_step=look, opt=opt)
    assert hooks and bool(moved)==(name!='Static')

@pytest.mark.parametrize('name', FIXED)
def test_the_number_of_active_weights_never_changes(name):
    m,seen = preset(name),set()
    model = started(net(), m)
    seen.add(sum(nnz(model)))
    trained(model, m, every_step=lambda step: seen.add(sum(nnz(model))))
    assert seen=={sum(n_active(p.numel(), .5) for p,*_ in sparse_params(model))}

@pytest.mark.parametrize('name', [k for k in FIXED if k not in ('SNFS', 'DSR', 'RigL_avg', 'GSE')])
def test_each_layer_keeps_its_number(name):
    m = preset(name)
    model = started(net(), m)
    start = nnz(model)
    trained(model, m, every_step=lambda step: [pytest.fail(f'step {step}') for _ in [0] if nnz(model)!=start])

@pytest.mark.parametrize('redistribute_f', [CATALOGUE['RigL_avg']['redistribute_f'], None])
@pytest.mark.parametrize('keep_score_f,stay', [(magnitude_no_empty_rows, True), (weight_magnitude, False)])
def test_no_row_with_weights_loses_them_all(keep_score_f, stay, redistribute_f):
    "Even weak rows, as long as a layer keeps a weight for each; drop by magnitude alone empties them"
    m,model = preset('RigL_avg', keep_score_f=keep_score_f, redistribute_f=redistribute_f), net()
    started(model, m, .6)                                                                    # so that half of the weights are still enough for all rows
    for mod in model.modules():
        if hasattr(mod, 'weight'): mod.weight.data[::2] *= 1e-3
    has = lambda: [k.any(1) for k in masks(model)]
    before,held = has(),[]
    left = [sum(map(int, k.sum(1))) for k in masks(model)]
    def look(step):
        enough = [n-int(m.drop_pct((step-1)/40)*n)>=int(was.sum()) for n,was in zip(left, before)]     # weights that stay, and rows that want one
        assert all(enough) or redistribute_f
        held.append(all((now|~was).all() for was,now,e in zip(before, has(), enough) if e))
        before[:],left[:] = has(),nnz(model)
    trained(model, m, every_step=look, opt=momentum_sgd(model, lr=1e-4))
    assert all(held)==stay

@pytest.mark.parametrize('name', DYNAMIC)
def test_same_seed_same_run(name):
    runs = []
    for seed in (3, 3):
        m = preset(name, seed=seed)
        model = started(net(), m)
        opt = trained(model, m)
        runs.append(snapshot(model, opt))
    assert not changed(*runs)

@pytest.mark.parametrize('name', ['SET', 'SET_original', 'SET_ITOP', 'DSR', 'MEST', 'MEST_soft', 'CHTs', 'CHTss'])
def test_another_seed_grows_elsewhere(name):
    runs = []
    for seed in (3, 4):
        m = preset(name, seed=seed)
        model = started(net(), m)
        trained(model, m)
        runs.append(masks(model))
    assert not same_masks(*runs)

@pytest.mark.parametrize('name', list(CATALOGUE))
def test_sparsity_zero_is_said_to_be_dense(name):
    "Nothing gets a mask, and the error says so"
    m = preset(name)
    model = started(net(), m, 0.)
    assert not list(sparse_params(model))
    with pytest.raises(ValueError, match='sparsity above 0 .at 0 no layer gets a mask'): trained(model, m)

@pytest.mark.parametrize('sparsity', [.5, .95, .99])
def test_srigl_at_extremes(sparsity):
    "Refused where a row would be left without a weight, else within a row's fan-in of the budget"
    m = preset('SRigL')
    if sparsity>.9:
        with pytest.raises(ValueError, match='fewer than one for each'): started(net(), m, sparsity)
        return
    trained(model := started(net(), m, sparsity), m)
    assert all(0<=n_active(k.numel(), sparsity)-int(k.sum())<len(k) for k in masks(model))

@pytest.mark.parametrize('sparsity', [.05, .9, .995, .999])
@pytest.mark.parametrize('name', [k for k in DYNAMIC if k not in ('SRigL', 'SR_STE')])
def test_extreme_sparsity(name, sparsity):
    m = preset(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                                        # of layers without weights
        model = started(net(), m, sparsity)
    trained(model, m)
    want = sum(n_active(p.numel(), sparsity) for p,*_ in sparse_params(model))
    if m.prune_share_f: want = n_active(n_params(model), sparsity)
    assert abs(sum(nnz(model))-want)<=(1 if m.prune_share_f else 0) and masked_are_zero(model)

@pytest.mark.parametrize('name', [k for k in DYNAMIC if k not in ('SRigL', 'SR_STE')])
def test_one_weight_layers_and_equal_scores(name):
    "All weights and gradients the same, and layers with a single weight"
    m = preset(name)
    model = nn.Sequential(nn.Linear(8, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 3, bias=False))
    for p in model.parameters(): p.data.fill_(.5)
    started(model, m, .34)
    trained(model, m)
    assert masked_are_zero(model) and sum(nnz(model))==n_active(12, .34)==8

@pytest.mark.parametrize('name', [k for k in DYNAMIC if k not in ('SNFS',)])
def test_adam(name):
    m = preset(name)
    model = started(net(), m)
    opt = trained(model, m, opt=torch.optim.Adam(model.parameters(), lr=1e-2))
    assert masked_are_zero(model)
    for l in sparse_layers(model):
        trains = l.mask if l.recall('trains') is None else l.recall('trains')
        assert all((t[~trains]==0).all() for t in opt_tensors(opt, l.p).values())

def generated(seed, sizes, convs):
    "Linear layers; or convolutions with norms, by turns 3x3 without a bias and 1x1 with one, then linear layers"
    torch.manual_seed(seed)
    if not convs: return mlp(8, *sizes, 4)
    layers,n = [nn.Unflatten(1, (8,1,1)), nn.Upsample(size=3)], 8
    for i,c in enumerate(sizes):
        layers += [nn.Conv2d(n, c, (3,1)[i%2], padding=(1,0)[i%2], bias=bool(i%2)), nn.BatchNorm2d(c), nn.ReLU()]
        n = c
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 4))

def budget(m, model, step, total):
    "(fewest, most) active weights that an update should leave, in all"
    layers,pos = sparse_layers(model),m.sparsity_pos(step, (step-1)/total)
    N,targets = [l.p.numel() for l in layers], [l.target for l in layers]
    if m.prune_share_f: return [n_active(sum(N), m.sparsity_at(sum(n*s for n,s in zip(N, targets))/sum(N), pos))]*2
    most = sum(n_active(n, m.sparsity_at(s, pos)) for n,s in zip(N, targets))
    return most-(sum(len(l.p)-1 for l in layers) if m.pattern_f is fan_in_pattern else 0), most

@given(st.sampled_from(DYNAMIC), st.lists(st.integers(1, 6).map(lambda i: 4*i), min_size=1, max_size=3), st.booleans(), st.sampled_from([.5, .25, .75]), st.integers(3, 9), st.integers(0, 9))
def test_generated_models(name, sizes, convs, sparsity, every, seed):
    "Whatever the model: at every update the model's budget, zeros, and patterns"
    if name=='SR_STE': sparsity = .5
    m,model,total,updates = preset(name, every), generated(seed, sizes, convs), 30, []
    if name=='SRigL' and any(n_active(l.weight.numel(), sparsity)<len(l.weight) for l in model if isinstance(l, (nn.Linear, nn.Conv2d))): return
    started(model, m, sparsity)
    def look(step):
        if not m.due(step, (step-1)/total): return
        updates.append(step)
        low,high = budget(m, model, step, total)
        assert low<=sum(nnz(model))<=high and masked_are_zero(model), step
        if m.pattern_f is not drop_grow: assert all(fits_pattern(mask, m.pattern_f) for mask in masks(model))
    trained(model, m, total, look)
    assert masked_are_zero(model) and updates

# ------------------------------------------------------------ sparsity over time
def at_update(name, model, m, total=60):
    "[(step, number of active weights by layer)] at every update"
    seen = []
    trained(model, m, total, lambda step: seen.append((step, nnz(model))) if m.due(step, (step-1)/total) else None)
    return seen

@pytest.mark.parametrize('name', ['GMP', 'MEST_soft'])
def test_each_layer_follows_the_schedule(name):
    m,total,s = preset(name, every=4),60,.8
    apart = .1 if name=='GMP' else 0.
    model = started(net(), m, s, sparse_f=lambda params, S: [S, max(S-apart, 0.), 0.])
    seen,numel = at_update(name, model, m, total),[192,480]
    def sparsity(s, pct, last):
        if name=='GMP':
            pos = 1. if last else min(max(pct/.75, 0), 1)
            return s+(0-s)*(1-pos)**3
        start = 1-1.2*(1-s)
        return s if pct>=.75 or last else (start+s)/2 if pct>=90/160 else start
    assert len(seen)==14
    for j,(step,n) in enumerate(seen):
        want = [round((1-sparsity(si, (step-1)/total, j==13))*N) for si,N in zip((s, s-apart), numel)]
        assert n==want, step
    assert seen[-1][1]==[round(.2*192), round((.2+apart)*480)]

@pytest.mark.parametrize('name,start', [('GraNet', 0.), ('GraNet_half', .5)])
def test_granet_total_follows_the_cubic_schedule(name, start):
    m,total,s = preset(name, every=4),60,.8
    model = started(net(), m, s)
    N = n_params(model)
    assert abs(sum(nnz(model))-(1-start)*N)<=3
    for j,(step,n) in enumerate(at_update(name, model, m, total)):
        pos = 1. if j==13 else min((step-1)/total/.5, 1)
        want = n_active(N, s+(start-s)*(1-pos)**3)
        assert sum(n)==want, step
    assert len(set(nnz(model)))==3 and sum(nnz(model))==n_active(N, s)

def test_gmp_average_density():
    "1 - s(1-b) - 3/4 s(b-a), as counted over a training: `spec2.md` 8"
    for (a,b),s,want in [((.25, .75), .5, .6875), ((.25, .75), .8, .5), ((.25, .75), .9, .4375), ((10/32, 25/32), .5, .7148), ((10/32, 25/32), .8, .5438), ((10/32, 25/32), .9, .4867), ((0., .75), .9, 1-.9*.25-.75*.9*.75)]:
        m = preset('GMP_lm', every=1, sparsity_span=(a, b))
        assert sum(1-m.sparsity_at(s, m.sparsity_pos(k, total=20_000)) for k in range(1, 20_001))/20_000==pytest.approx(want, abs=1e-4)
        assert 1-s*(1-b)-.75*s*(b-a)==pytest.approx(want, abs=5.1e-5)
    assert preset('GMP_lm').sparsity_span==(.25, .75)

def test_chase_prunes_to_its_budget_and_grows_beyond_it():
    "Exact at every update: B + x(t) of all weights, x from 5 % to none over 130 of 160 epochs, then the budget; the last update leaves the budget"
    m,total,s = preset('Chase', every=4),160,.9
    model = started(net(sizes=(8,40,30,4)), m, s)
    N = n_params(model)
    B,seen = n_active(N, s),at_update('Chase', model, m, total)
    assert abs(sum(nnz(model))-B)<=0
    for step,n in seen:
        pct,last = (step-1)/total,step==seen[-1][0]
        x = 0. if last or pct>=130/160 else .025*(1+math.cos(math.pi*pct*160/130))
        assert sum(n)==n_active(N, s-x) and all(n), step
    assert max(sum(n) for _,n in seen)>1.4*B and len({tuple(n) for _,n in seen})>20

def test_chase_drops_the_smallest_of_all_and_grows_the_largest_gradients_of_all():
    "One update, by sorting everything: `spec2.md` 6"
    m,model = preset('Chase', every=2),net()
    started(model, m, .5, sparse_f=uniform_sparsity)
    opt = momentum_sgd(model, lr=0.)
    layers = sparse_layers(model)
    model(torch.randn(16, 8)).square().sum().backward()
    for l in layers: l.mask.copy_(l.mask | (torch.rand(l.shape)<.1)); l.p.data.mul_(l.mask)
    at = [(l.p.detach().abs().flatten(), l.mask.flatten().clone(), l.p.grad.abs().flatten()) for l in layers]
    w,old,g = (torch.cat(ts) for ts in zip(*at))
    N,B,x = len(w), n_active(len(w), .5), .025*(1+math.cos(math.pi*(9/100)*160/130))
    with torch.no_grad(): rewire(m, layers, opt, Time.of(10, total=100))
    kept = sorted(torch.where(old)[0].tolist(), key=lambda i: (-w[i].item(), i))[:B]
    grown = sorted(set(range(N))-set(kept), key=lambda i: (-g[i].item(), i))[:n_active(N, .5-x)-B]
    new = torch.cat([l.mask.flatten() for l in layers])
    assert set(torch.where(new)[0].tolist())=={*kept, *grown}

@pytest.mark.parametrize('change,match', [(dict(sparsity_sched_f=None, initial_sparsity=0., prune_share_f=None), 'extra_density_f must be None without sparsity_sched_f'), (dict(grow_share_f=None), 'extra_density_f must be None without grow_share_f')])
def test_extra_density_needs_pruning_and_a_share(change, match):
    with pytest.raises(ValueError, match=match): preset('Chase', **change)

def test_extra_density_must_be_a_share():
    model = started(net(), m := preset('Chase', extra_density_f=lambda pct: -.1))
    with pytest.raises(ValueError, match='what extra_density_f, .*gives'): trained(model, m)

def test_acdc_phases():
    m,total,s = preset('ACDC', every=1, sparsity_sched_f=partial(square_wave, at=(.25,.5,.75))),40,.8
    model = started(net(), m, s)
    seen = dict(at_update('ACDC', model, m, total))
    N = n_params(model)
    for step,n in seen.items():
        dense = (step-1)/total<.25 or .5<=(step-1)/total<.75
        assert sum(n)==(N if dense and step!=39 else n_active(N, s)), step
    assert sum(nnz(model))==n_active(N, s)

@pytest.mark.parametrize('epochs', [4, 10, 100])
def test_acdc_phases_through_the_callback(epochs):
    "As shipped: dense and sparse phases by turns in trainings of any length, each within a hundredth of training of its place"
    from fastai.basics import Callback
    from sparsefast.callback import DynamicSparseTrainingCallback
    learn,seen = learner(net(sizes=(8,24,3)), n_iter=max(2, 200//epochs)), []
    learn.sparsify(.8, ACDC_presets)
    class Look(Callback):
        order = 100
        def after_batch(self):
            if self.training: seen.append(all(bool(mask.all()) for *_,mask in masked_params(learn.model)))
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[DynamicSparseTrainingCallback(**ACDC_presets), Look()])
    total = len(seen)
    changes = [i/total for i in range(1, total) if seen[i]!=seen[i-1]]
    want = [*(i/100 for i in range(10, 80, 5)), .85]
    assert seen[0] and not seen[-1] and len(changes)==len(want) and all(abs(a-b)<=.015 for a,b in zip(changes, want))

def test_acdc_restores_from_zero():
    m = preset('ACDC', every=1, sparsity_sched_f=partial(square_wave, at=(.25,.5,.75)))
    model = started(net(), m, .8)
    opt,before = momentum_sgd(model),{}
    def look(step):
        if step==20: before.update({p: mask.clone() for _,_,p,mask in masked_params(model)})
        if step==21:                                                                     # the dense phase begins after this step
            for l in sparse_layers(model):
                assert l.mask.all() and (l.p[~before[l.p]]==0).all() and (opt.state[l.p]['momentum_buffer'][~before[l.p]]==0).all()
        if step==22: assert any((l.p[~before[l.p]]!=0).any() for l in sparse_layers(model))
    trained(model, m, 40, look, opt)

def test_global_pruning_takes_the_smallest_of_the_model():
    m = preset('GraNet', every=4, initial_drop_grow_pct=0., final_drop_grow_pct=0.)
    model = started(net(), m, .7)
    def look(step):
        if step!=8: return
        kept = torch.cat([p[mask].abs() for _,_,p,mask in masked_params(model)])
        assert len(kept)==n_active(n_params(model), m.sparsity_at(.7, m.sparsity_pos(8, 7/40)))
    weights = {}
    opt = momentum_sgd(model)
    for step,(x,y) in enumerate(batches(8, n_out=4), 1):
        backward(model, x, y)
        if m.before_step(model, opt, step, (step-1)/40):
            opt.step()
            if step==8: weights = {p: (p.detach().abs()*mask).clone() for _,_,p,mask in masked_params(model)}
            m.after_step(model, opt, step, (step-1)/40)
    look(8)
    flat,mask = torch.cat([w.flatten() for w in weights.values()]), torch.cat([m.flatten() for m in masks(model)])
    assert flat[mask].min()>=flat[~mask].max()

def test_schedule_never_regrows():
    "Masks that are sparser than the schedule stay as they are, with a warning"
    m = preset('GMP')
    model = net()
    sparsify_model(model, .8)
    before = masks(model)
    with pytest.warns(UserWarning, match='nothing to prune.*starts at sparsity 0'): trained(model, m)
    assert same_masks(before, masks(model))

def test_training_too_short_for_an_update_warns():
    m = preset('GMP', every=50)
    model = started(net(), m)
    with pytest.warns(UserWarning, match='no update has brought'): trained(model, m, 20)
    with pytest.warns(UserWarning, match='no update falls into 20.*so sparsity will stay'): m.check(model, momentum_sgd(model), 20)

def test_an_interval_longer_than_training_warns():
    "Methods of fixed density, too; static masks have no updates to miss"
    model = started(net(), m := preset('RigL_ITOP', every=4000))
    with pytest.warns(UserWarning, match='=4000: no update falls into 60 optimizer steps, so the masks will stay'): m.check(model, momentum_sgd(model), 60)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        preset('Static').check(model, momentum_sgd(model), 60)
        preset('RigL', every=30).check(model, momentum_sgd(model), 60)

@pytest.mark.parametrize('name,change,match', [
    ('RigL', dict(penalty_f=sr_ste_penalty), 'penalty_f must be None without explore_pct'), ('TopKAST', dict(grow_value_f=random_value), 'grow_value_f must be None with explore_pct'),
    ('RigL', dict(prune_share_f=global_share), 'prune_share_f.*sparsity_sched_f'), ('RigL', dict(initial_sparsity=.2), 'initial_sparsity.*sparsity_sched_f')])
def test_settings_that_would_do_nothing_are_refused(name, change, match):
    with pytest.raises(ValueError, match=match): preset(name, **change)

@pytest.mark.parametrize('bad', [1.5, -.2, float('nan')])
def test_a_share_that_is_none_names_its_schedule(bad):
    def odd(start, end, pos): return bad
    model = started(net(), m := preset('RigL', drop_sched_f=odd))
    before = masks(model)
    with pytest.raises(ValueError, match='drop_sched_f, odd, gives at'): trained(model, m)
    assert same_masks(before, masks(model))

def test_a_layer_that_loses_all_its_weights_is_told():
    m,model = preset('GraNet', every=5), net()
    started(model, m, .9)
    model[2].weight.data.mul_(1e-6)
    with pytest.warns(UserWarning, match='removed every weight of `weight` of Linear.in_features=24, out_features=20'): trained(model, m, opt=momentum_sgd(model, lr=0.))

@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_schedules_stay_between_their_ends(a, b, pos):
    for f in (cosine_anneal, linear_anneal, constant_anneal, inverse_power_anneal, partial(inverse_power_anneal, power=1), step_anneal, square_wave):
        assert min(a, b)-1e-12<=f(a, b, pos)<=max(a, b)+1e-12
        assert f(a, b, 0.)==pytest.approx(a) and (f is constant_anneal or f(a, b, 1.)==pytest.approx(b))

def test_vectors_of_the_schedules():
    assert [round(inverse_power_anneal(0, .9, (t-1000)/10_000), 7) for t in (2000,3500,6000,8500,11_000)]==[.2439,.5203125,.7875,.8859375,.9]
    assert [inverse_power_anneal(.5, .9, q) for q in (.25,.5,.75)]==pytest.approx([.73125,.85,.89375])
    for t,want in {0: .3, 100: .2926584774, 250: .2560660172, 500: .15, 750: .0439339828, 900: .0073415226, 1000: 0}.items():
        assert cosine_anneal(.3, 0, t/1000)==pytest.approx(want, abs=1e-10)

def test_earlier_names():
    from sparsefast import allocation, schedules
    assert schedules.alternate is schedules.square_wave and schedules.denser is schedules.density_times and allocation.threshold_share is allocation.adaptive_threshold_share

# ------------------------------------------------------------ allocation
scores_lists = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=4)

@given(scores_lists, st.floats(0, 1))
def test_global_share(scores, frac):
    total = int(frac*sum(map(len, scores)))
    got,_ = global_share([torch.tensor(s).float() for s in scores], total)
    order = sorted(((v,-i,-j) for i,s in enumerate(scores) for j,v in enumerate(s)))[:total]    # the lowest; of equals the later ones
    assert got==[sum(-i==l for _,i,_ in order) for l in range(len(scores))]

@given(scores_lists, st.integers(0, 20), st.floats(.5, 9))
def test_threshold_share(scores, total, cut):
    got,nxt = adaptive_threshold_share([torch.tensor(s).float() for s in scores], total, cut)
    want = [min(sum(v<cut for v in s), len(s)-1) for s in scores]
    assert got==want and nxt==(cut/2 if sum(want)>1.1*total else 2*cut if sum(want)<.9*total else cut)

@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_survivor_redistribution(layers):
    numel = [n for n,*_ in layers]
    nnz   = [int(n*a) for n,a,_ in layers]
    drop  = [int(a*d) for a,(_,_,d) in zip(nnz, layers)]
    grow  = survivor_redistribution(None, nnz, numel, drop)
    assert sum(grow)==sum(drop) and all(0<=g<=n-a+d for g,n,a,d in zip(grow, numel, nnz, drop))
    alive = [a-d for a,d in zip(nnz, drop)]
    if sum(alive) and all(sum(drop)*s/sum(alive)+1<=n-a for s,n,a in zip(alive, numel, nnz)):
        assert all(abs(g-sum(drop)*s/sum(alive))<=len(grow) for g,s in zip(grow, alive))

def test_dsr_update_by_hand():
    "One update against loops: threshold, survivors' shares, and no weight that was just dropped"
    m = preset('DSR', drop_share_f=partial(adaptive_threshold_share, initial=.08))
    model = started(net(), m, .6)
    backward(model, *batches(1, n_out=4)[0])
    before = [(p.detach().clone(), mask.clone()) for _,_,p,mask in masked_params(model)]
    m.update(model, momentum_sgd(model), 5, .1)
    drop = [int(((p.abs()<.08)&mask).sum()) for p,mask in before]
    start = [int(mask.sum()) for _,mask in before]
    grow = survivor_redistribution(None, start, [p.numel() for p,_ in before], drop)
    assert sum(drop)>20 and drop!=grow
    for (w,old),new,d,g,(_,_,p,_) in zip(before, masks(model), drop, grow, masked_params(model)):
        assert int(new.sum())==int(old.sum())-d+g and not ((w.abs()<.08)&old&new).any() and (p[new&~old]==0).all()
    target = sum(int(.14*a) for a in start)
    for l in sparse_layers(model): assert l.recall('shared').item()==pytest.approx(.04 if sum(drop)>1.1*target else .08 if sum(drop)>=.9*target else .16)

# ------------------------------------------------------------ scores, values, penalties
@given(st.lists(st.floats(-2, 2).map(lambda v: round(v, 2)), min_size=1, max_size=20), st.floats(0, .9))
def test_per_sign_drop(weights, frac):
    "Of each sign the share goes, give or take the one weight by which the whole number differs"
    w = torch.tensor(weights)
    keep = drop_grow(torch.ones_like(w, dtype=torch.bool), per_sign_magnitude(w), torch.zeros_like(w), int(frac*len(w)), 0)
    for sign in (w>=0, w<0):
        n,gone = int(sign.sum()),int((sign&~keep).sum())
        assert math.floor(frac*n+1e-9)-1<=gone<=math.floor(frac*n+1e-9)+1
        if 0<gone<n: assert w[sign&~keep].abs().max()<=w[sign&keep].abs().min()

def test_random_values_and_their_state():
    m = preset('SET_original')
    model = started(net(), m, .6)
    opt = momentum_sgd(model)
    trained(model, m, 4, opt=opt)
    backward(model, *batches(1, n_out=4)[0])
    before = {p: (p.detach().clone(), mask.clone(), opt.state[p]['momentum_buffer'].clone()) for _,_,p,mask in masked_params(model)}
    m.update(model, opt, 5, .1)
    fresh = []
    for _,_,p,mask in masked_params(model):
        w,old,mom = before[p]
        fresh.append(p[mask&~old])
        assert torch.equal(p[mask&old], w[mask&old]) and (p[~mask]==0).all()
        assert (opt.state[p]['momentum_buffer'][mask&~old]==0).all() and torch.equal(opt.state[p]['momentum_buffer'][mask&old], mom[mask&old])
    fresh = torch.cat(fresh)
    assert len(fresh)>50 and (fresh!=0).all() and .07<fresh.std()<.13

def test_gradient_values():
    m = preset('RigL', grow_value_f=partial(gradient_value, scale=.5))
    model = started(net(), m, .6)
    backward(model, *batches(1, n_out=4)[0])
    before = {p: (mask.clone(), p.grad.clone()) for _,_,p,mask in masked_params(model)}
    assert not m.update(model, momentum_sgd(model), 5, .1)                               # it takes the step's place
    for _,_,p,mask in masked_params(model):
        old,g = before[p]
        assert (mask&~old).any() and torch.equal(p[mask&~old], -.5*g[mask&~old])

def test_growth_by_averaged_gradients():
    "Grown is what the mean gradient of the last steps wants, and the sum is gone afterwards"
    m = preset('RigL', every=5, grad_steps=3)
    model = started(net(), m, .6)
    opt,grads = momentum_sgd(model, lr=.3),[]
    for step,(x,y) in enumerate(batches(5, n_out=4), 1):
        backward(model, x, y)
        grads.append([p.grad.clone() for _,_,p,_ in masked_params(model)])
        if step==5: weights,old = [p.detach().clone() for _,_,p,_ in masked_params(model)],masks(model)
        m.step(model, opt, step, (step-1)/100)
    for j,(w,mask,new) in enumerate(zip(weights, old, masks(model))):
        mean = (grads[2][j]+grads[3][j]+grads[4][j])/3
        k = int(m.drop_pct(.04)*int(mask.sum()))
        assert torch.equal(new, drop_grow(mask, w.abs(), mean.abs(), k)) and not torch.equal(new, drop_grow(mask, w.abs(), grads[4][j].abs(), k))
    assert not any('dst' in k for k in model.state_dict())

def test_averaged_over_the_whole_interval():
    runs = []
    for grad_steps in (None, 5, 4):
        model = started(net(), m := preset('RigL', every=5, grad_steps=grad_steps), .6)
        trained(model, m)
        runs.append(masks(model))
        assert not any('dst' in k for k in model.state_dict())                               # nothing is collected for an update that will not come
    assert same_masks(runs[0], runs[1]) and not same_masks(runs[0], runs[2])

@pytest.mark.parametrize('value,match', [(0, 'grad_steps must be a whole number'), (1.5, 'grad_steps must be'), (6, 'grad_steps must be at most batches_per_update, 5')])
def test_wrong_grad_steps(value, match):
    with pytest.raises(ValueError, match=match): preset('RigL', grad_steps=value)

def test_state_function_is_an_axis():
    "`reset_state_f` sees every place where a weight came or went"
    seen = []
    m = preset('RigL', reset_state_f=lambda p, opt, where: seen.append((p, where.clone())))
    model = started(net(), m, .6)
    backward(model, *batches(1, n_out=4)[0])
    old = masks(model)
    m.update(model, momentum_sgd(model), 5, .1)
    assert all(torch.equal(w, ~(a&b)) for (_,w),a,b in zip(seen, old, masks(model))) and len(seen)==3

# ------------------------------------------------------------ weights that train without being used
def topkast_reference(theta, n_used, n_trains, grads_of, steps, lr, mom, wd, penalty, every=1):
    "Lists: theta whole, the used part A, the part B that trains; returns theta and A after each step"
    N,v = len(theta),[0.]*len(theta)
    A = reference.top_k([abs(t) for t in theta], n_used)
    B = reference.top_k([abs(t) for t in theta], n_trains)
    B = A|set(sorted(B-A, key=lambda i: (-abs(theta[i]), i))[:n_trains-n_used])
    out = []
    for step in range(1, steps+1):
        g = grads_of(step, [t if i in A else 0. for i,t in enumerate(theta)])
        for i in B:
            gi = g[i]+penalty(theta[i], i in A, n_used/N)+wd*theta[i]
            v[i] = mom*v[i]+gi
            theta[i] -= lr*v[i]
        if step%every==0 and step<steps:
            A = reference.top_k([abs(t) for t in theta], n_used)
            B = reference.top_k([abs(t) for t in theta], n_trains)
            v = [x if i in B else 0. for i,x in enumerate(v)]
        out.append((list(theta), set(A)))
    return out

@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('name', ['TopKAST', 'SR_STE'])
def test_second_mask_equals_reference(name, every):
    torch.manual_seed(0)
    model,total = nn.Linear(8, 4, bias=False).double(),24
    scale = .05
    m = preset(name, every, **(dict(penalty_f=partial(exploration_penalty, scale=scale), explore_pct=.25) if name=='TopKAST'
                               else dict(penalty_f=partial(sr_ste_penalty, scale=scale), pattern_f=drop_grow)))
    theta = model.weight.detach().flatten().tolist()
    started(model, m, .5)
    data = [(torch.randn(5, 8).double(), torch.randn(5, 4).double()) for _ in range(total)]
    def grads_of(step, w):
        W = torch.tensor(w, dtype=torch.float64).view(4,8).requires_grad_()
        x,y = data[step-1]
        return torch.autograd.grad(((x@W.t()-y)**2).mean(), W)[0].flatten().tolist()
    penalty = (lambda t, used, D: scale*t*(1 if used else 1/D)) if name=='TopKAST' else lambda t, used, D: 0 if used else scale*t
    want = topkast_reference(theta, 16, 24 if name=='TopKAST' else 32, grads_of, total, .1, .9, 1e-2, penalty, every)
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-2)
    for step,(x,y) in enumerate(data, 1):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        m.step(model, opt, step, (step-1)/total)
        th,A = want[step-1]
        assert {i for i,b in enumerate(model.weight_mask.flatten().tolist()) if b}==A, step
        torch.testing.assert_close((model.weight+model.weight_dst_store).flatten(), torch.tensor(th, dtype=torch.float64), rtol=0, atol=1e-12)
        assert (model.weight[~model.weight_mask]==0).all() and (model.weight_dst_store[model.weight_mask]==0).all()
    assert want[-1][1]!=want[0][1]

def test_second_mask_needs_the_dense_values():
    m,model = preset('TopKAST'),net()
    sparsify_model(model, .5)
    with pytest.raises(ValueError, match='keep_dense=True'): trained(model, m)

def test_second_mask_and_overflow():
    "A gradient that is not finite at an update: nothing is lost, nothing moves"
    m,model = preset('TopKAST', 2),net()
    started(model, m, .5)
    opt = trained(model, m, 5)
    before = snapshot(model, opt)
    backward(model, *batches(1, n_out=4)[0])
    model[0].weight.grad[0,0] = float('inf')
    with pytest.warns(UserWarning, match='not finite'): m.step(model, opt, 6, .1)
    assert not changed(before, snapshot(model, opt))

def test_score_that_raises_keeps_the_store():
    def bad(p, **kw): raise RuntimeError('no')
    m = preset('TopKAST', 2, grow_score_f=bad)
    model = started(net(), m, .5)
    opt,before = momentum_sgd(model),None
    backward(model, *batches(1, n_out=4)[0])
    before = snapshot(model)
    with pytest.raises(RuntimeError): m.update(model, opt, 2, .1)
    assert not changed(before, snapshot(model))

# ------------------------------------------------------------ memory
@pytest.mark.parametrize('name', ['DSR', 'TopKAST', 'RigL'])
def test_memory_travels_with_the_optimizer(name):
    "Stopped after step 17, saved, loaded into a new model, and continued: the same as never stopped"
    extra = dict(grad_steps=4) if name=='RigL' else {}
    m,total,data = preset(name, 5, **extra),40,batches(40, n_out=4)
    def run(model, opt, steps):
        for step in steps:
            backward(model, *data[step-1])
            m.step(model, opt, step, (step-1)/total)
    whole = started(net(), m, .6)
    opt = momentum_sgd(whole)
    run(whole, opt, range(1, 18))
    saved,opt_saved = copy.deepcopy(whole.state_dict()),copy.deepcopy(opt.state_dict())
    run(whole, opt, range(18, 41))
    again = started(net(1), m, .6)
    opt = momentum_sgd(again)
    assert opt_saved['param_groups'][0]['sparsefast_memory'] and {k for k in saved if '_dst_' in k}==({k for k in saved if k.endswith('_dst_store')} if name=='TopKAST' else set())
    again.load_state_dict(saved)
    opt.load_state_dict(opt_saved)
    run(again, opt, range(18, 41))
    assert not changed(snapshot(whole), snapshot(again))

# ------------------------------------------------------------ patterns, by every dynamic method
PATTERNS = {'2:4': (NM, .5), '1x4 blocks': (partial(block_pattern, size=(1,4)), .5), 'constant fan-in': (fan_in_pattern, .5), '1:4': (partial(nm_pattern, n=1, m=4), .75)}

@pytest.mark.parametrize('pattern', list(PATTERNS))
@pytest.mark.parametrize('name', [k for k in DYNAMIC if k not in ('SRigL', 'SR_STE')])
def test_any_method_in_any_pattern(name, pattern):
    pattern_f,s = PATTERNS[pattern]
    if name in SCHEDULED and ':' in pattern: pattern_f = partial(pattern_f, gradual=True)
    m = preset(name, pattern_f=pattern_f)
    model = started(net(), m, s)
    seen = []
    def look(step):
        assert all(fits_pattern(mask, pattern_f) for mask in masks(model)), step
        seen.append(sum(nnz(model)))
    start = masks(model)
    trained(model, m, every_step=look)
    assert masked_are_zero(model) and not same_masks(start, masks(model))
    assert all(fits_pattern(mask, PATTERNS[pattern][0]) for mask in masks(model))
    want = n_active(n_params(model), s)
    if pattern=='constant fan-in' or m.redistribute_f or m.prune_share_f: assert .8*want<=seen[-1]<=want
    else: assert seen[-1]==want

def test_final_sparsity_must_fit_the_pattern():
    "Four classes cannot share the two weights that are left in the end"
    m,model = preset('GMP', pattern_f=fan_in_pattern),net()
    started(model, m, .98, sparse_f=uniform_sparsity)
    before = masks(model)
    with pytest.raises(ValueError, match=r'final sparsity of Linear.*0.98, does not fit fan_in_pattern: 2 weights are fewer than one for each of the 4 rows'):
        m.check(model, momentum_sgd(model))
    assert same_masks(before, masks(model))
    m.check(started(net(), m, .9, sparse_f=uniform_sparsity), None)

def test_pattern_of_the_masks_is_checked():
    m,model = preset('RigL', pattern_f=NM),net()
    sparsify_model(model, .5)
    with pytest.raises(ValueError, match=r'does not follow nm_pattern\(n=2, m=4\).*sparsify_model'): trained(model, m)

# ------------------------------------------------------------ from a dense checkpoint
@pytest.mark.parametrize('name', list(CATALOGUE))
def test_from_a_dense_checkpoint(name):
    "The largest weights stay as they are, momentum goes on with them, and any method trains what is left"
    dense,m = net(),preset(name)
    opt = momentum_sgd(dense)
    plain_loop(dense, opt, None, 20)
    checkpoint,model = copy.deepcopy((dense.state_dict(), opt.state_dict())),net(1)
    opt = momentum_sgd(model)
    model.load_state_dict(checkpoint[0]); opt.load_state_dict(checkpoint[1])
    started(model, m, .75, score_f=weight_magnitude, **(dict(pattern_f=partial(nm_pattern, n=1, m=4)) if name=='SR_STE' else {}))
    if name=='SR_STE': m = preset(name, pattern_f=partial(nm_pattern, n=1, m=4))
    for p,mask,_ in sparse_params(model):
        old = dict(dense.named_parameters())[next(k for k,v in model.named_parameters() if v is p)]
        assert torch.equal(p[mask], old[mask])
        if m.pattern_f is drop_grow and not mask.all(): assert old[mask].abs().min()>=old[~mask].abs().max()
    def look(step):
        for l in sparse_layers(model):
            trains = l.mask if l.recall('trains') is None else l.recall('trains')
            assert (l.p[~l.mask]==0).all()
            if name!='SNFS': assert all((t[~trains]==0).all() for t in opt_tensors(opt, l.p).values())
    plain_loop(model, opt, m, 40, look)
    assert sum(nnz(model))<=round(.25*n_params(model))
