"Distributions: the published tables, and the budget"
import math
import pytest, torch
from hypothesis import given, strategies as st
import reference
from sparsefast.distributions import *

CONVNET = [(32,3,3,3), (128,32,3,3), (512,128,3,3), (10,512)]
LENET   = [(300,784), (100,300), (10,100)]
def params(shapes): return [torch.empty(s, device='meta') for s in shapes]
def counts(shapes, sparsities): return [math.prod(s)-math.floor(sp*math.prod(s)) for s,sp in zip(shapes, sparsities)]

@pytest.mark.parametrize('S,kw,expected', [
    (.9, {},                           [0, .6823195284, .9227328371, 0]),
    (.8, {},                           [0, .3314707421, .8373983808, 0]),
    (.9, dict(erk_power_scale=.5),     [.4213114587, .8217364130, .9120846186, .1517768977]),
    (.9, dict(include_kernel=False),   [0, .6843181413, .9210795353, .1760703489])], ids=['ERK .9', 'ERK .8', 'power .5', 'ER'])
def test_convnet(S, kw, expected): assert erdos_renyi_sparsity(params(CONVNET), S, **kw)==pytest.approx(expected, abs=1e-9, rel=0)

@pytest.mark.parametrize('S,nnz', [(.9,[864,11_711,45_575,5_120]), (.8,[864,24_645,95_907,5_120])])
def test_convnet_counts(S, nnz): assert counts(CONVNET, erdos_renyi_sparsity(params(CONVNET), S))==nnz

def test_by_hand():
    eps = 57_285/812
    assert erdos_renyi_sparsity(params(CONVNET), .9)==pytest.approx([0, 1-eps*166/36864, 1-eps*646/589824, 0], abs=1e-9, rel=0)

def test_power_0_is_uniform_up_to_the_floors():
    z = sum(math.floor(.9*math.prod(s)) for s in CONVNET)
    assert erdos_renyi_sparsity(params(CONVNET), .9, erk_power_scale=0)==pytest.approx([z/632_672]*4, abs=1e-9, rel=0)
    assert erdos_renyi_sparsity(params(CONVNET), .9, erk_power_scale=0)==pytest.approx([.9]*4, abs=1e-5, rel=0)

def test_er_has_no_power():
    er = lambda **kw: erdos_renyi_sparsity(params(CONVNET), .9, include_kernel=False, **kw)
    assert er(erk_power_scale=.5)==er()

@pytest.mark.parametrize('S,expected', [(.8,[.837759,.530638,0]), (.9,[.920432,.769811,0]), (.95,[.961516,.888666,.081493]),
                                        (.98,[.984606,.955466,.632597]), (.99,[.992303,.977733,.816299])])
def test_lenet(S, expected): assert erdos_renyi_sparsity(params(LENET), S)==pytest.approx(expected, abs=5.1e-7, rel=0)
def test_lenet_counts(): assert counts(LENET, erdos_renyi_sparsity(params(LENET), .9))==[18_715, 6_906, 1_000]

# ResNet-50's layers in torchvision's order: (shape, sparsity and nnz at .8, sparsity and nnz at .9)
def _resnet50():
    conv1x1 = {4_096:     ((0,4_096), (0,4_096)),                 16_384:    ((0,16_384), (.041181,15_710)),
               32_768:    ((0,32_768), (.425304,18_832)),         65_536:    ((.024680,63_919), (.522079,31_322)),
               131_072:   ((.415112,76_663), (.713397,37_566)),   262_144:   ((.513099,127_639), (.761412,62_545)),
               524_288:   ((.707936,153_126), (.856884,75_034)),  1_048_576: ((.756740,255_077), (.880799,124_992)),
               2_097_152: ((.854063,306_053), (.928489,149_971))}
    conv3x3 = {64:  ((.638095,13_342), (.822662,6_538)),  128: ((.823099,26_086), (.913316,12_783)),
               256: ((.912562,51_573), (.957154,25_272)), 512: ((.956534,102_549), (.978701,50_251))}
    rows,n_in = [((64,3,7,7), (.142805,8_065), (.579962,3_952))],64
    for width,blocks in zip((64,128,256,512), (3,4,6,3)):
        for b in range(blocks):
            one = lambda o,i: rows.append(((o,i,1,1), *conv1x1[o*i]))
            one(width, n_in); rows.append(((width,width,3,3), *conv3x3[width])); one(4*width, width)
            if b==0: one(4*width, n_in)
            n_in = 4*width
    return rows + [((1000,2048), (.851824,303_464), (.927392,148_702))]

@pytest.mark.parametrize('col,S', [(1,.8), (2,.9)])
def test_resnet50(col, S):
    rows = _resnet50()
    shapes = [r[0] for r in rows]
    assert len(rows)==54 and sum(map(math.prod, shapes))==25_502_912
    sp = erdos_renyi_sparsity(params(shapes), S)
    assert sp==pytest.approx([r[col][0] for r in rows], abs=5.1e-7, rel=0)
    assert counts(shapes, sp)==[r[col][1] for r in rows]

# ------------------------------------------------------------ for any layers
dims  = st.integers(1, 64)
shape = st.one_of(st.tuples(dims, dims), st.tuples(dims, dims, st.integers(1, 7)), st.tuples(dims, dims, st.integers(1, 5), st.integers(1, 5)))
layers = st.lists(shape, min_size=1, max_size=8) | st.tuples(shape, st.integers(1, 6)).map(lambda o: [o[0]]*o[1])
options = st.sampled_from([{}, dict(erk_power_scale=.5), dict(erk_power_scale=0.), dict(include_kernel=False), dict(erk_power_scale=2.)])

@given(layers, st.floats(0, 1), options)
def test_budget(shapes, S, kw):
    sp = erdos_renyi_sparsity(params(shapes), S, **kw)
    budget = sum(math.prod(s)-math.floor(S*math.prod(s)) for s in shapes)
    assert len(sp)==len(shapes) and all(isinstance(s, float) and 0<=s<=1 for s in sp)
    assert sum((1-s)*math.prod(sh) for s,sh in zip(sp, shapes))==pytest.approx(budget, rel=1e-9, abs=1e-6)

@given(layers, st.floats(0, 1), options)
def test_equals_reference(shapes, S, kw):
    ref = reference.erk(shapes, S, kw.get('include_kernel', True), kw.get('erk_power_scale', 1.))
    assert erdos_renyi_sparsity(params(shapes), S, **kw)==pytest.approx(ref, abs=1e-9, rel=0)

@given(layers, st.floats(0, 1), options)
def test_same_shape_same_sparsity(shapes, S, kw):
    by_shape = {}
    for s,sp in zip(shapes, erdos_renyi_sparsity(params(shapes), S, **kw)): assert by_shape.setdefault(s, sp)==sp

@given(layers, options)
def test_extremes(shapes, kw):
    assert erdos_renyi_sparsity(params(shapes), 1., **kw)==[1.]*len(shapes)
    assert erdos_renyi_sparsity(params(shapes), 0., **kw)==pytest.approx([0.]*len(shapes), abs=1e-12)

@given(layers, options)
def test_sparsity_0_is_exactly_dense(shapes, kw):
    "else a layer would get a mask of ones"
    assert erdos_renyi_sparsity(params(shapes), 0., **kw)==[0.]*len(shapes)

def test_identical_layers_are_uniform():
    assert erdos_renyi_sparsity(params([(64,64,3,3)]*5), .75)==pytest.approx([.75]*5, abs=1e-12)

@given(layers, st.floats(0, 1))
def test_uniform(shapes, S):
    assert uniform_sparsity(params(shapes), S)==[S]*len(shapes)
    assert first_layer_dense_uniform(params(shapes), S)==[0.]+[S]*(len(shapes)-1)

@pytest.mark.parametrize('f', [uniform_sparsity, first_layer_dense_uniform, erdos_renyi_sparsity], ids=lambda f: f.__name__)
def test_parameters_are_not_touched(f):
    ps = [torch.randn(5,4), torch.randn(3,5)]
    copies = [p.clone() for p in ps]
    f(ps, .5)
    assert all(torch.equal(a, b) for a,b in zip(ps, copies)) and f([], .5)==[]

# ------------------------------------------------------------ LAMP and ERK+
def slow_lamp(w):
    "The definition, pair by pair in float64; of equal weights the later is the larger"
    flat = [x.item()**2 for x in w.double().flatten()]
    return [a and a/sum(b for j,b in enumerate(flat) if (b, j)>=(a, i)) for i,a in enumerate(flat)]

@pytest.mark.parametrize('w,want', [([[3.,1],[2,0]], [[1,1/14],[4/13,0]]), ([[.3,.3,-.1],[.2,.05,.4]], [[.264706,.36,.025641],[.105263,.006369,1]])])
def test_lamp_scores(w, want):
    assert torch.allclose(lamp_score(torch.tensor(w)), torch.tensor(want, dtype=torch.float64), atol=5e-7)
    assert lamp_score(torch.tensor(w)).flatten().tolist()==pytest.approx(slow_lamp(torch.tensor(w)), rel=1e-12)

def test_lamp_shares_out_exactly():
    "Five of ten weights: two and three, where magnitude over the whole model leaves three and two; a layer of zeros scores 0"
    two = [torch.tensor([[3.,1],[2,0]]),torch.tensor([[.3,.3,-.1],[.2,.05,.4]])]
    count = lambda f: [round((1-s)*p.numel()) for p,s in zip(two, f(two, .5))]
    assert count(lamp_sparsity)==[2, 3] and count(global_sparsity(lambda p, **kw: p.abs()))==[3, 2]
    assert lamp_score(torch.zeros(2, 3)).eq(0).all() and lamp_score(two[0], mask=torch.tensor([[False,True],[True,True]])).tolist()==[[0,pytest.approx(.2)],[1,0]]

@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 99))
def test_lamp_is_exact_and_empties_no_layer(shapes, S, seed):
    g = torch.Generator().manual_seed(seed)
    ps = [torch.randn(s, generator=g)*10**i for i,s in enumerate(shapes)]
    n = [round((1-s)*p.numel()) for p,s in zip(ps, lamp_sparsity(ps, S))]
    assert abs(sum(n)-(1-S)*sum(p.numel() for p in ps))<=.5+1e-6 and (sum(n)<len(ps) or all(n))
    wide = sorted((-v, i) for i,v in enumerate(v for p in ps for v in slow_lamp(p)))
    ends = [sum(p.numel() for p in ps[:i+1]) for i in range(len(ps))]
    want = [sum(1 for _,at in wide[:sum(n)] if (ends[i-1] if i else 0)<=at<e) for i,e in enumerate(ends)]
    assert n==want

def test_lamp_by_name_keeps_the_largest_of_each_layer():
    from torch import nn
    from sparsefast.masks import masked_params
    from sparsefast.sparsify import sparsify_model
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    with torch.no_grad(): model[0].weight.mul_(10)
    ws,want = [m.weight.detach().clone() for m in model],lamp_sparsity([m.weight for m in model], .8)
    sparsify_model(model, .8, sparse_f='lamp', keep='magnitude')
    for w,s,(*_,mask) in zip(ws, want, masked_params(model), strict=True):
        assert int(mask.sum())==round((1-s)*w.numel()) and w[mask].abs().min()>=w[~mask].abs().max()
    assert sum(int(m.sum()) for *_,m in masked_params(model))==180

@given(layers.filter(lambda o: len(o)>1), st.floats(0, 1), st.floats(0, 1))
def test_erk_plus_is_inside_the_budget(shapes, S, last):
    ps = params(shapes)
    n = [p.numel() for p in ps]
    zeros = S*sum(n)-n[-1]*(1-last)
    if not 0<=zeros<=sum(n[:-1]):
        if not -1e-5*sum(n)<=zeros<=sum(n[:-1])+1e-5*sum(n):
            with pytest.raises(ValueError, match='model_sparsity must be from .* where the last layer has density'): erk_plus(ps, S, last)
        return
    sp = erk_plus(ps, S, last)
    assert sp[-1]==1-last and sp[:-1]==erdos_renyi_sparsity(ps[:-1], zeros/sum(n[:-1]))
    assert sum(k*s for k,s in zip(n, sp))==pytest.approx(S*sum(n), abs=len(n)+1e-6)       # ERK rounds zeros layer by layer

def test_erk_plus_of_the_convnet():
    sp = erk_plus(params(CONVNET), .95)
    assert sp[-1]==0 and sp[0]==0 and counts(CONVNET, sp)[-1]==5120 and sum(counts(CONVNET, sp))==pytest.approx(.05*632_672, abs=4)
    assert erk_plus(params(CONVNET), .95, .2)[-1]==.8 and erk_plus(params(CONVNET), .95, erk_power_scale=0.)[1]==pytest.approx(erk_plus(params(CONVNET), .95, erk_power_scale=0.)[2])
