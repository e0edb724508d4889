"Norms of inputs, Wanda, RIA, OWL, and pruning block by block: vectors, plain references, and models that are left alone"
import copy, warnings
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from helpers import *
from sparsefast.calibration import *
from sparsefast.calibration import _input_sums
from sparsefast.importance import *
from sparsefast.one_shot import *
from sparsefast.patterns import nm_pattern
from sparsefast.select import weight_names
from sparsefast.sparsify import sparsify_model

# ------------------------------------------------------------ norms
LINEAR = torch.tensor([[1,0,2,-1,.5],[0,3,-2,1,.5],[2,0,1,1,0]])
W = torch.tensor([[.5,-.1,.7,.2,-.9],[-.3,.05,.4,-.8,.6],[.1,.1,.1,.1,.1],[1,-2,.25,.3,-.4]])

def linear(w=W):
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    return layer

def vector_norms(layer):
    "With a count of one, so that the norms are those of the sums"
    norms = collect_norms(layer, LINEAR, bar=False)
    return InputNorms({n: (s, torch.ones_like(k)) for n,(s,k) in norms.sums.items()}, layer)

def test_vector_of_a_linear_layer():
    norms = collect_norms(layer := linear(), LINEAR, bar=False)
    squares,count = norms.sums['Linear']
    assert squares.dtype==torch.float64 and squares.flatten().tolist()==[5,9,9,3,.5] and count.flatten().tolist()==[3]
    assert torch.allclose(norms.norms(layer.weight).flatten()*3**.5, torch.tensor([2.236068,3,3,1.732051,.707107], dtype=torch.float64), atol=1e-6)

def test_vector_of_a_convolution():
    image = torch.arange(1., 17).view(1,1,4,4)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    squares,count = collect_norms(conv, torch.cat([image, -image/2], 1), bar=False).sums['Conv2d']
    first = torch.tensor([[36,74,100],[104,212,264],[232,468,552.]], dtype=torch.float64)
    assert torch.equal(squares[0,0], torch.stack([first, first/4])) and int(count)==4

CONVS = [dict(stride=1), dict(stride=2, padding=1), dict(stride=(3,1), padding=(2,0), dilation=(1,2)), dict(dilation=3, padding='same'), dict(padding='valid'),
         dict(padding=2, padding_mode='reflect', stride=2), dict(padding=1, padding_mode='circular'), dict(groups=2, padding=1, stride=2), dict(groups=4, dilation=2)]

def columns(conv, x):
    "All that each place of a filter reads, by moving one filter place at a time: (channels, places, positions), in float64"
    x = x.double()
    out = []
    for c in range(x.shape[1]):
        for at in range(conv.kernel_size[0]*conv.kernel_size[1]):
            probe = nn.Conv2d(1, 1, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False, padding_mode=conv.padding_mode).double()
            probe.weight.data.zero_().view(-1)[at] = 1
            with torch.no_grad(): out.append(probe(x[:,c:c+1]).flatten())
    return torch.stack(out).view(x.shape[1], *conv.kernel_size, -1)

@pytest.mark.parametrize('options', CONVS, ids=str)
@pytest.mark.parametrize('kernel', [(3,3), (2,3), (1,1)], ids=str)
def test_convolutions(options, kernel):
    torch.manual_seed(0)
    conv,x = nn.Conv2d(4, 8, kernel, **options),torch.randn(5, 4, 9, 8)
    norms = collect_norms(conv, [x[:2], x[2:]], bar=False)
    read = columns(conv, x)
    want = read.square().mean(-1).sqrt()
    found = norms.norms(conv.weight)
    assert torch.allclose(found.flatten(0,2), want.view_as(found.flatten(0,2)), rtol=1e-5) and int(norms.sums['Conv2d'][1].max())==read.shape[-1]
    score,g = wanda(norms)(conv.weight),conv.groups
    for o in range(8):                                                                       # a filter reads its group's channels
        mine = want[o//(8//g)*(4//g):][:4//g]
        assert torch.allclose(score[o].double(), conv.weight[o].double().abs()*mine, rtol=1e-5)

@pytest.mark.parametrize('conv,shape', [(nn.Conv1d(3,2,4,stride=2,padding=1), (3,11)), (nn.Conv3d(2,2,(2,3,1),stride=(1,2,1),dilation=(2,1,1)), (2,6,7,3))], ids=['1d','3d'])
def test_other_dimensions(conv, shape):
    "Against the gradient of a sum of squares of outputs: A_k is the sum over outputs of d out / d w_k, squared"
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    found,count = _input_sums(conv, x)
    w = torch.ones(1, *conv.weight.shape[1:], dtype=torch.float64, requires_grad=True)
    f = F.conv1d if x.dim()==3 else F.conv3d
    f(x.double().square(), w, None, conv.stride, conv.padding, conv.dilation).sum().backward()
    assert torch.allclose(found.double(), w.grad[0], rtol=1e-5) and count==conv(x).numel()//2
    assert torch.allclose(_input_sums(conv, x[0])[0]+_input_sums(conv, x[1:])[0], found, rtol=1e-5)          # without a batch dimension too

@pytest.mark.parametrize('groups', [1, 2])
def test_transposed_convolutions(groups):
    torch.manual_seed(0)
    conv,x = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups),torch.randn(2, 4, 5, 5)
    norms = collect_norms(conv, x, bar=False)
    size = x.double().square().mean((0,2,3)).sqrt()
    assert torch.allclose(wanda(norms)(conv.weight).double(), conv.weight.double().abs()*size[:,None,None,None], rtol=1e-5)
    assert ria(norms)(conv.weight).shape==conv.weight.shape

def test_hugging_faces_linear_layer():
    Conv1D = pytest.importorskip('transformers.pytorch_utils').Conv1D
    torch.manual_seed(0)
    layer,x = Conv1D(6, 4),torch.randn(3, 5, 4)
    twin = nn.Linear(4, 6)
    twin.weight.data = layer.weight.data.T.clone()
    norms,same = (collect_norms(m, x, bar=False) for m in (layer, twin))
    assert torch.equal(norms.norms(layer.weight), same.norms(twin.weight))
    for score in (wanda, ria): assert torch.allclose(score(norms)(layer.weight), score(same)(twin.weight).T)
    for m,n in ((layer, norms), (twin, same)): sparsify_model(m, .5, score_f=wanda(n), pattern_f=wanda_rows)
    assert torch.equal(layer.weight_mask, twin.weight_mask.T)

@pytest.mark.parametrize('kdim', [None, 6])
@pytest.mark.parametrize('batch_first', [True, False])
def test_attention(kdim, batch_first):
    torch.manual_seed(0)
    m = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=batch_first)
    nn.init.normal_(m.out_proj.bias)
    q,k,v = torch.randn(3, 5, 8),torch.randn(3, 5, kdim or 8),torch.randn(3, 5, kdim or 8)
    seen,plain = [],m.eval()(q, k, v)
    model = nn.Module()
    model.attn,model.forward = m,lambda q,k,v: seen.append(model.attn(q, key=k, value=v)) or seen[-1]
    norms = collect_norms(model, [(q,k,v,0)], bar=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(plain, seen[0]))              # the model computes as ever
    parts = [x.double().square().mean((0,1)).sqrt() for x in (q,k,v)]
    if kdim: found = [norms.norms(p)[0,0] for p in (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)]
    else: found = norms.norms(m.in_proj_weight)[:,0]
    assert all(torch.allclose(a, b, rtol=1e-5) for a,b in zip(found, parts))
    before = (plain[0]-m.out_proj.bias).detach().double() @ torch.linalg.inv(m.out_proj.weight.detach().double()).T
    assert torch.allclose(norms.norms(m.out_proj.weight)[0,0], before.square().mean((0,1)).sqrt(), rtol=1e-3)
    if not kdim:
        score = wanda(norms)(m.in_proj_weight)
        assert torch.allclose(score[8:16].double(), m.in_proj_weight[8:16].double().abs()*parts[1], rtol=1e-5)

def test_fused_encoders_are_seen():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x,fast = torch.randn(2, 5, 8),torch.backends.mha.get_fastpath_enabled()
    norms = collect_norms(model, x, bar=False)
    assert len(norms.sums)==8 and torch.backends.mha.get_fastpath_enabled()==fast
    assert torch.allclose(norms.norms(model.layers[0].self_attn.in_proj_weight)[1,0], x.double().square().mean((0,1)).sqrt(), rtol=1e-5)

class Twice(nn.Module):
    "A layer that runs twice, and one that shares its weight"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.idle = nn.Linear(4, 4),nn.Linear(4, 4),nn.Linear(4, 4)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(2*self.a(self.a(x)))

def test_layers_used_twice_and_tied_ones_add():
    torch.manual_seed(0)
    model,x = Twice(),torch.randn(7, 4)
    norms = collect_norms(model, x, bar=False)
    one = model.a(x); two = 2*model.a(one)
    seen = torch.cat([x, one, two]).double()
    assert torch.allclose(norms.norms(model.b.weight).flatten(), seen.square().mean(0).sqrt(), rtol=1e-5) and list(norms.sums)==['a']
    with pytest.raises(ValueError, match='idle has no norms'): wanda(norms)(model.idle.weight)
    with pytest.raises(ValueError, match='a parameter of shape'): wanda(norms)(nn.Parameter(torch.ones(4, 4)))

@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_parts_add_up_to_the_whole(sizes, seed):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    parts = [torch.randn(n, 5, generator=g, dtype=torch.float64) for n in sizes]
    added,whole = sum(collect_norms(model, p, bar=False) for p in parts),collect_norms(model, torch.cat(parts), bar=False)
    for n,(squares,count) in whole.sums.items():
        assert torch.allclose(added.sums[n][0], squares, rtol=1e-12) and torch.equal(added.sums[n][1], count)

def test_sums_are_plain_and_travel(tmp_path):
    model,twin = mlp(8, 6, 3),mlp(8, 6, 3)
    x = torch.randn(4, 8)
    norms = collect_norms(model, x, bar=False)
    torch.save(norms.sums, tmp_path/'norms.pt')
    again = InputNorms(torch.load(tmp_path/'norms.pt', weights_only=True), twin)
    assert torch.equal(again.norms(twin[0].weight), norms.norms(model[0].weight)) and torch.equal((norms+again).norms(model[0].weight), norms.norms(model[0].weight))
    with pytest.raises(ValueError, match='same weights to be added, got 2'): norms + InputNorms({'0': norms.sums['0']}, model)

def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    layer,x = nn.Linear(4, 3).bfloat16(),(100*torch.randn(3000, 4)).bfloat16()
    norms = collect_norms(layer, x, bar=False)
    assert torch.allclose(norms.norms(layer.weight).flatten(), x.double().square().mean(0).sqrt(), rtol=1e-5)
    assert wanda(norms)(layer.weight).dtype==torch.float32

# ------------------------------------------------------------ what is collected on, and what is left
def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Unflatten(1, (2,2,2)), nn.Conv2d(2, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Dropout(.5), nn.Linear(6, 3))
    model.train(); model[2].eval()
    before,modes,rng = snapshot(model),[m.training for m in model.modules()],torch.get_rng_state()
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    collect_norms(model, torch.randn(4, 8), bar=False)
    rng = torch.get_rng_state()
    collect_norms(model, torch.ones(4, 8), bar=False)
    assert not changed(before, snapshot(model)) and modes==[m.training for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert hooks==[(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] and torch.is_grad_enabled()

@pytest.mark.parametrize('where', [0, 1])
def test_also_after_an_error(where):
    class Breaks(nn.Module):
        def forward(self, x, *args, **kwargs): raise RuntimeError('broken')
    attn = nn.MultiheadAttention(4, 1)
    model = nn.Module()
    model.attn,model.breaks = attn,Breaks()
    weight,bias = attn.out_proj.weight,attn.out_proj.bias
    def forward(x):
        if where==0: attn(x, x, x[:,:0])                                                     # fails within attention
        return model.breaks(attn(x, x, x)[0])
    model.forward = forward
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(Exception): collect_norms(model, torch.randn(2, 3, 4), bar=False)
    assert attn.out_proj.weight is weight and attn.out_proj.bias is bias and model.training and torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules()) and torch.backends.mha.get_fastpath_enabled()==fast

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 3)
    def forward(self, x, labels=None): return self.l(x)

def test_kinds_of_batches():
    torch.manual_seed(0)
    learn = learner(mlp(8, 6, 3))
    data = torch.cat([b[0] for b in learn.dls.train])
    model,x,y = learn.model,data,torch.zeros(len(data))
    want = collect_norms(model, x, bar=False).norms(model[0].weight)
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    for given in (learn, learn.dls, learn.dls.train, loader, iter(loader), [x], [(x, y)], (x, y), [(x,)], list(x.split(9))):
        assert torch.allclose(collect_norms(model, given, bar=False).norms(model[0].weight), want, rtol=1e-6)
    assert torch.allclose(collect_norms(learn, learn, bar=False).norms(model[0].weight), want, rtol=1e-6)
    named = Named()
    for given in ({'x': x, 'labels': y}, [{'x': x}]): assert torch.allclose(collect_norms(named, given, bar=False).norms(named.l.weight), want, rtol=1e-6)
    first = collect_norms(model, loader, n_batches=2, bar=False)
    assert int(first.sums['0'][1].max())==14
    only = collect_norms(model, x, which=0, bar=False)
    assert list(only.sums)==['0']
    with pytest.raises(ValueError, match='at least one batch'): collect_norms(model, [], bar=False)

# ------------------------------------------------------------ Wanda
def reference(w, norms, sparsity, rows=True):
    "The fifteen lines: float64, stable ascending sort, `int(i*s)` of each row go"
    score = w.double().abs()*norms.double()
    if not rows: score = score.view(1, -1)
    drop = torch.zeros_like(score, dtype=torch.bool)
    order = score.sort(dim=-1, stable=True).indices[:,:int(score.shape[1]*sparsity)]
    return ~drop.scatter(1, order, True).view(w.shape)

def bits(mask): return mask.int().tolist()

def test_vector_wanda():
    norms = vector_norms(layer := linear())
    sparsify_model(layer, .4, score_f=wanda(norms), pattern_f=wanda_rows)
    assert bits(layer.weight_mask)==[[1,0,1,0,1],[1,0,1,1,0],[1,1,1,0,0],[1,1,1,0,0]]
    magnitude = linear()
    sparsify_model(magnitude, .4, keep='magnitude', pattern_f=wanda_rows)
    assert bits(magnitude.weight_mask)==[[1,0,1,0,1],[0,0,1,1,1],[0,0,1,1,1],[1,1,0,0,1]]

def test_vector_two_of_four():
    layer = linear(torch.tensor([[.5,-.1,.7,.2],[-.3,.05,.4,-.8]]))
    norms = collect_norms(layer, torch.diag(torch.tensor([2.,3,1,1])), bar=False)
    norms.sums['Linear'][1].fill_(1)
    assert torch.allclose(wanda(norms)(layer.weight), torch.tensor([[1,.3,.7,.2],[.6,.15,.4,.8]]))
    sparsify_model(layer, .5, score_f=wanda(norms), pattern_f=nm_pattern)
    assert bits(layer.weight_mask)==[[1,0,1,0],[1,0,0,1]]

@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 100), st.integers(0, 9999), st.booleans())
@settings(max_examples=150, deadline=None)
def test_wanda_rows_are_the_references(o, i, percent, seed, ties):
    g,s = torch.Generator().manual_seed(seed),percent/100
    if i*s-int(i*s)>=1-.5/o-1e-9 or int(i*s)==i: return                                     # as the docs say; and an empty layer
    w = torch.randint(1, 4, (o, i), generator=g).float() if ties else torch.randn(o, i, generator=g)
    layer = linear(w)
    x = torch.randint(0, 3, (4, i), generator=g).float() if ties else torch.randn(4, i, generator=g)
    norms = collect_norms(layer, x, bar=False)
    want = reference(w, wanda(norms)(layer.weight).double()/w.double().abs(), s)
    sparsify_model(layer, s, score_f=wanda(norms), pattern_f=wanda_rows)
    mask = getattr(layer, 'weight_mask', torch.ones_like(w, dtype=torch.bool))
    assert torch.equal(mask, want)

def test_wanda_in_a_convolution_by_filters():
    torch.manual_seed(0)
    conv,x = nn.Conv2d(4, 6, 3, padding=1),torch.randn(2, 4, 6, 6)
    norms = collect_norms(conv, x, bar=False)
    want = reference(conv.weight.detach().flatten(1), norms.norms(conv.weight).flatten(), .5)
    sparsify_model(conv, .5, score_f=wanda(norms), pattern_f=wanda_rows)
    assert torch.equal(conv.weight_mask.flatten(1), want)

def test_rows_stay_even_when_masks_move():
    model,x = sparse_rows(),batches(40)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    from sparsefast.presets import RigL
    method = RigL(update_every=4, pattern_f=wanda_rows)
    start = masks(model)
    plain_loop(model, opt, method)
    assert not same_masks(start, masks(model)) and all(len(set(m.sum(1).tolist()))==1 for m in masks(model)) and nnz(model)==[int(m.sum()) for m in start]

def sparse_rows():
    torch.manual_seed(0)
    model = mlp(8, 24, 20, 3)
    sparsify_model(model, .6, score_f=wanda(collect_norms(model, torch.randn(9, 8), bar=False)), pattern_f=wanda_rows)
    return model

def test_dead_inputs_go_first():
    layer = nn.Linear(4, 3)
    norms = collect_norms(layer, torch.tensor([[1.,0,1,0]]), bar=False)
    sparsify_model(layer, .5, score_f=wanda(norms), pattern_f=wanda_rows)
    assert bits(layer.weight_mask)==[[1,0,1,0]]*3

# ------------------------------------------------------------ RIA
def test_vector_ria():
    for pattern,want in ((wanda_rows, [[1,0,1,0,1],[0,0,1,1,1],[1,1,1,0,0],[1,1,1,0,0]]), (None, [[1,0,1,0,1],[1,0,1,1,1],[0,1,1,0,0],[1,1,1,0,0]])):
        norms = vector_norms(layer := linear())
        sparsify_model(layer, .4, score_f=ria(norms), **(dict(pattern_f=pattern) if pattern else {}))
        assert bits(layer.weight_mask)==want

def test_vector_relative_importance():
    w = torch.tensor([[4,-1,0,2],[0,3,-2,0],[1,0,0,-.5],[0,0,0,0]])
    norms = collect_norms(layer := linear(w), torch.ones(1, 4), bar=False)
    want = torch.tensor([[1.371429,.392857,0,1.085714],[0,1.35,1.4,0],[.866667,0,0,.533333],[0,0,0,0]])
    assert torch.allclose(ria(norms, a=0)(layer.weight), want, atol=1e-6)

def test_ria_of_a_grouped_convolution_is_that_of_its_groups():
    torch.manual_seed(0)
    conv,x = nn.Conv1d(4, 6, 3, groups=2),torch.randn(2, 4, 9)
    score = ria(collect_norms(conv, x, bar=False))(conv.weight)
    for k in range(2):
        part = nn.Conv1d(2, 3, 3)
        part.weight.data = conv.weight.data[3*k:3*k+3].clone()
        assert torch.allclose(score[3*k:3*k+3], ria(collect_norms(part, x[:,2*k:2*k+2], bar=False))(part.weight))

# ------------------------------------------------------------ OWL
class Blocks(nn.Module):
    def __init__(self, n=4, size=10, scale=1.):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, size, bias=False), nn.ReLU(), nn.Linear(size, size, bias=False)) for _ in range(n))
    def forward(self, x):
        for l in self.layers: x = x+l(x)
        return x

def with_outliers(*n):
    "Blocks with so many of 200 scores far above the mean, the others equal"
    model = Blocks(len(n))
    for b,k in zip(model.layers, n):
        for i in (0, 2): b[i].weight.data.fill_(1e-3)
        b[0].weight.data.view(-1)[:k] = 1
    params = [p for p in model.parameters()]
    return model, params, InputNorms({w: (torch.ones(1,1,10).double(), torch.ones(1,1,1).double()) for w in weight_names(model).values()}, model)

def test_vector_owl():
    model,params,norms = with_outliers(2, 5, 1, 4)
    found = owl(norms, M=5)(params, .7)
    assert torch.allclose(torch.tensor(found)[::2], torch.tensor([.74,.62,.78,.66]), atol=1e-9) and found[::2]==found[1::2]

@pytest.mark.parametrize('total', [0., .03, .5, .9, .97, 1.])
def test_owl_meets_the_total_and_the_range(total):
    model,params,norms = with_outliers(2, 5, 1, 4)
    params = params[1:]                                                                      # blocks of unequal size
    found = owl(norms)(params, total)
    zeros = [round(s*p.numel()) for s,p in zip(found, params)]
    assert sum(zeros)==round(total*700) and all(0<=s<=1 for s in found)
    assert owl(norms)([], .5)==[]

def test_owl_of_equal_blocks_is_uniform():
    model,params,norms = with_outliers(3, 3)
    assert owl(norms)(params, .5)==[.5]*4

def test_blocks_by_name():
    model,params,norms = with_outliers(2, 5)
    assert [block_name(model, n) for n in weight_names(model).values()]==['layers.0']*2+['layers.1']*2
    assert block_name(nn.Linear(2, 2), 'Linear')=='Linear' and block_name(mlp(8, 6, 3), '2')=='2'
    assert owl(norms, blocks=lambda name: 'all')(params, .5)==[.5]*4

def test_owl_in_sparsify_model_is_exact():
    torch.manual_seed(0)
    model = Blocks(3, 16)
    model.layers[1][0].weight.data[0] *= 50
    norms = collect_norms(model, torch.randn(50, 16), bar=False)
    sparsify_model(model, .7, score_f=wanda(norms), sparse_f=owl(norms))
    assert sum(nnz(model))==round(.3*6*256) and nnz(model)[2]>nnz(model)[0]

# ------------------------------------------------------------ one-shot
def by_hand(model, x, s, a=None):
    "Block by block, with plain loops: what comes in, which weights go, and on with the outputs of the block that is cut"
    model,x,made = copy.deepcopy(model).double(),x.double(),[]
    with torch.no_grad():
        for b in model.layers:
            h = x
            found = []
            for m in b:
                if isinstance(m, nn.Linear): found.append((m, h.square().mean(0).sqrt()))
                h = m(h)
            for m,norms in found:
                made.append(reference(m.weight, norms, s))
                m.weight.mul_(made[-1])
            x = x+b(x)
    return made

@pytest.mark.parametrize('s', [.5, .7])
def test_block_by_block_is_the_reference(s):
    torch.manual_seed(0)
    model,x = Blocks(4).double(),torch.randn(30, 10).double()*torch.rand(10)
    want,once = by_hand(model, x, s),copy.deepcopy(model)
    prune_blocks(model, list(x.split(8)), s, pattern_f=wanda_rows, bar=False)
    prune_at_once(once, x, s, pattern_f=wanda_rows, bar=False)
    assert same_masks(masks(model), want) and masked_are_zero(model)
    assert same_masks(masks(once)[:2], want[:2]) and not same_masks(masks(once), want)

def test_block_by_block_with_other_parts():
    torch.manual_seed(0)
    model,x = Blocks(3, 16),torch.randn(40, 16)
    model.layers[1][0].weight.data[0] *= 50
    norms = collect_norms(model, x, bar=False)
    hooks = prune_blocks(model, x, .7, partial(ria, a=1), sparse_f=owl(norms), exclude='layers.2.2', bar=False)
    assert sum(nnz(model))==round(.3*5*256) and len(nnz(model))==5 and nnz(model)[2]>nnz(model)[0]
    model.layers[0][0].weight.data.fill_(1.)
    model(x)
    assert masked_are_zero(model)
    hooks.remove()

def test_after_an_error_all_is_as_before():
    torch.manual_seed(0)
    model = Blocks(3)
    before = snapshot(model)
    def score(norms):
        if 'layers.2.0' in norms.sums: raise RuntimeError('broken')
        return wanda(norms)
    with pytest.raises(RuntimeError, match='broken'): prune_blocks(model, torch.randn(9, 10), .5, score, bar=False)
    assert not changed(before, snapshot(model)) and not masks(model)
    with pytest.raises(ValueError, match='2:4 needs a multiple'): prune_blocks(model, torch.randn(9, 10), .5, pattern_f=nm_pattern, bar=False)
    assert not changed(before, snapshot(model)) and not masks(model)

def test_a_layer_outside_lists_is_a_block_of_its_own():
    torch.manual_seed(0)
    model,x = mlp(10, 12, 8, 4).double(),torch.randn(20, 10).double()
    h,want = x,[]
    with torch.no_grad():
        for m in copy.deepcopy(model):
            if isinstance(m, nn.Linear):
                want.append(reference(m.weight, h.square().mean(0).sqrt(), .5))
                m.weight.mul_(want[-1])
            h = m(h)
    prune_blocks(model, x, .5, pattern_f=wanda_rows, bar=False)
    assert same_masks(masks(model), want) and masked_are_zero(model)

def test_a_model_of_hugging_face():
    "Blocks of transposed linear layers, batches that are dicts, and what a plain hook sees"
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=12)).eval()
    given = [dict(input_ids=torch.randint(50, (3, 12)), labels=torch.randint(50, (3, 12))) for _ in range(2)]
    seen = []
    fc = model.transformer.h[1].mlp.c_fc
    hook = fc.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().reshape(-1, 16)))
    norms = collect_norms(model, given, bar=False)
    hook.remove()
    size = torch.cat(seen).double().square().mean(0).sqrt()
    assert torch.allclose(wanda(norms)(fc.weight).double(), fc.weight.double().abs()*size[:,None], rtol=1e-5)
    assert block_name(model, 'transformer.h.1.mlp.c_fc')=='transformer.h.1'
    prune_blocks(model, given, .5, pattern_f=wanda_rows, exclude='lm_head', bar=False)
    assert len(masks(model))==8 and masked_are_zero(model) and all((m.sum(0)==len(m)//2).all() for m in masks(model))
