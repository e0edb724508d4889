"Growth by one ranking over the model: exact totals, bounds, ties, and gradients that layers can be compared by"
import math
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from sparsefast.allocation import *
from sparsefast.masks import masked_params
from sparsefast.methods import DSTMethod
from sparsefast.scores import *
from sparsefast.schedules import *
from sparsefast.sparsify import sparsify_model

# ------------------------------------------------------------ `spec2.md` 7: two layers, two of A dropped, two to grow
A = torch.tensor([[.5,-.1,0],[.3,0,.2]]),torch.tensor([[.9,.2,.25],[.1,.22,.1]])
B = torch.tensor([[2.,0,-1],[.4,0,0]]),torch.tensor([[.3,.15,.1],[.02,.12,.03]])

def two_layers():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
    for m,(w,g) in zip(model, (A, B)): m.weight.data,m.weight.grad = w.clone(),g.clone()
    for m in model: m.register_buffer('weight_mask', m.weight.data!=0)
    return model

@pytest.mark.parametrize('grow,want', [(gradient_magnitude, ([[1,0,1],[1,1,0]], [[1,0,1],[1,0,0]])), ('rms', ([[1,0,0],[1,0,0]], [[1,1,1],[1,1,0]])),
                                       ('typical', ([[1,0,0],[1,0,0]], [[1,1,1],[1,1,0]]))], ids=['raw', 'rms', 'typical'])
def test_drop_and_growth_over_the_whole_model(grow, want):
    def score(p, **kwargs): return relative_gradient(p, grow, **kwargs)
    score.reads = relative_gradient.reads
    method = DSTMethod(grow_score_f=score if isinstance(grow, str) else grow, initial_drop_grow_pct=.49, batches_per_update=10, drop_sched_f=constant_anneal,
                       drop_share_f=global_share, grow_share_f=global_growth)
    model = two_layers()
    method.update(model, torch.optim.SGD(model.parameters(), lr=.1), 10, total=100)
    assert tuple(m.weight_mask.int().tolist() for m in model)==want

def test_what_relative_gradients_are_divided_by():
    p = nn.Parameter(A[0].clone())
    p.grad = -A[1]
    kept = torch.tensor([[True,False,False],[True,False,False]])
    assert torch.allclose(relative_gradient(p, 'rms'), A[1]/.404331, rtol=1e-5) and torch.allclose(relative_gradient(p, 'typical', kept=kept), A[1]*.4)
    assert torch.allclose(relative_gradient(p, mask=p.data!=0), A[1]*.275) and torch.allclose(relative_gradient(p), A[1]*1.1/6)
    with pytest.raises(ValueError, match="by must be 'rms' or 'typical', got 'max'"): relative_gradient(p, 'max')
    p.grad = torch.zeros_like(p)
    assert not relative_gradient(p, 'rms').any() and not relative_gradient(p, kept=torch.zeros_like(kept)).any()
    half = nn.Parameter(A[0].half())
    half.grad = torch.full_like(half, 2e-4)                                                 # whose square is none in half precision
    assert torch.allclose(relative_gradient(half, 'rms'), torch.ones(2, 3), atol=1e-3)

# ------------------------------------------------------------ the share of each layer
def slow_growth(scores, total, kept, target, least, within):
    "One weight at a time: first what layers need, then the best that still fits"
    room = [len(s) for s in scores]
    need = [max(least-k, math.ceil(within[0]*t)-k if within else 0, 0) for k,t in zip(kept, target)]
    need = [min(n, r) for n,r in zip(need, room)]
    cap = [max(min(r, max(math.floor(within[1]*t)-k, 0) if within else r), n) for r,t,k,n in zip(room, target, kept, need)]
    if sum(need)>total: need = [n*total//sum(need) for n in need]
    order = [sorted(s, reverse=True) for s in scores]
    grow = list(need)
    for limits in (cap, room):
        while sum(grow)<total:
            free = [(-order[i][grow[i]], i) for i in range(len(scores)) if grow[i]<limits[i]]
            if not free: break
            grow[min(free)[1]] += 1
    return grow

layers = st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=9), st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=4)

@given(layers, st.floats(0, 1), st.integers(0, 2), st.sampled_from([None, (.2, 5), (.5, 1.2), (0, 0)]))
def test_global_growth_is_exact(layers, share, least, within):
    scores,kept,target = map(list, zip(*layers))
    total = int(share*sum(map(len, scores)))
    got = global_growth([torch.tensor(s, dtype=torch.float32) for s in scores], total, kept=kept, target=target, least=least, within=within)
    assert sum(got)==total and all(0<=g<=len(s) for g,s in zip(got, scores))
    assert got==slow_growth(scores, total, kept, target, least, within)

def test_global_growth_ranks_nan_last_and_earlier_layers_first():
    nan,inf = math.nan,math.inf
    assert global_growth([torch.tensor([nan, 1.]), torch.tensor([1., 0.])], 1)==[1, 0]
    assert global_growth([torch.tensor([nan, nan]), torch.tensor([-5., 0.])], 2, least=0)==[0, 2]
    assert global_growth([torch.tensor([1., 2.]), torch.tensor([inf, -inf])], 3, least=0)==[2, 1]
    assert global_growth([torch.tensor([.5, .4], dtype=torch.bfloat16), torch.tensor([.45], dtype=torch.float64)], 2, least=0)==[1, 1]

@pytest.mark.parametrize('within', [None, (.2, 5)])
def test_growth_over_the_whole_model_keeps_the_total(within):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))
    sparsify_model(model, .8, sparse_f='erk')
    target = [int(m.sum()) for *_,m in masked_params(model)]
    def share(*args, **kwargs): return global_growth(*args, within=within, **kwargs)
    share.needs_counts = True
    method = DSTMethod(batches_per_update=2, initial_drop_grow_pct=.5, drop_sched_f=constant_anneal, drop_share_f=global_share, grow_share_f=share, replaces_step=False)
    opt,moved = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9),set()
    for step in range(1, 21):
        model(torch.randn(16, 20)).square().mean().backward()
        method.step(model, opt, step, total=20)
        opt.zero_grad()
        counts = [int(m.sum()) for *_,m in masked_params(model)]
        moved.add(tuple(counts))
        assert sum(counts)==sum(target) and all(counts)
        if within: assert all(c>=math.ceil(.2*t) for c,t in zip(counts, target))
    assert len(moved)>1
