"Cutting dead units: the same outputs, everything that can go is gone, and what cannot be proved stays"
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from helpers import mlp, snapshot, changed
from sparsefast.ship.files import load_sparse, save_sparse
from sparsefast.masks import masked_params
from sparsefast.ship.shrink import shape_like, shrink_model
from sparsefast.sparsify import load_sparse_state, sparsify_model, unsparsify_model

def kill(m, rows=(), cols=()):
    "No active weights in these rows and columns"
    mask = m._buffers.get('weight_mask')
    for i in rows: m.weight.data[i] = 0; mask is not None and mask[i].fill_(False)
    for i in cols: m.weight.data[:,i] = 0; mask is not None and mask[:,i].fill_(False)

def lively(model, seed=0):
    "Float64, evaluation, with norms and biases that are not trivial"
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight, m.bias, m.running_mean): t.data.copy_(torch.randn(t.shape, generator=g))
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g)+0.5)
    return model.double().eval()

def same(model, *xs):
    small,cuts = shrink_model(model, *xs)
    with torch.no_grad(): a,b = model(*xs),small(*xs)
    assert (a-b).abs().max()<=1e-11*(1+a.abs().max())
    assert shrink_model(small, *xs)[1]=={}                                                # nothing is left to cut
    return small,cuts

# ------------------------------------------------------------ counts against a search by hand
def alive(ws):
    "Units of each hidden layer that have inputs and listeners, to a fixed point, in loops"
    live = [set(range(len(w))) for w in ws[:-1]]
    while True:
        old = [set(l) for l in live]
        for i,l in enumerate(live):
            for u in list(l):
                ins = any(ws[i][u,j]!=0 for j in (live[i-1] if i else range(ws[i].shape[1])))
                outs = any(ws[i+1][k,u]!=0 for k in (live[i+1] if i+1<len(live) else range(len(ws[i+1]))))
                if not (ins and outs): l.discard(u)
        if live==old: return [max(len(l), 1) for l in live]

@given(st.integers(0, 30), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.98]), st.booleans(), st.booleans())
@settings(max_examples=40)
@pytest.mark.filterwarnings('ignore:a layer of')
def test_mlp(seed, sparsity, bias, masked):
    torch.manual_seed(seed)
    model = mlp(6, 12, 10, 8, 3, bias=bias).double().eval()
    sparsify_model(model, sparsity)
    if not masked: unsparsify_model(model)
    before = snapshot(model)
    small,cuts = same(model, torch.randn(5, 6, dtype=torch.float64))
    assert not changed(before, snapshot(model))
    lin = [m for m in small if isinstance(m, nn.Linear)]
    expect = alive([m.weight.detach() for m in model if isinstance(m, nn.Linear)])
    got = [len(m.weight) for m in lin[:-1]]
    assert got==expect or any(e==1 for e in expect)                                       # where a layer has died, one unit remains, and its neighbours may too
    assert all(g>=e for g,e in zip(got, expect))
    for m in lin: assert m.weight.shape==(m.out_features, m.in_features) and (m.bias is None or len(m.bias)==m.out_features)
    for m,n,p,mask in masked_params(small): assert (p[~mask]==0).all() and abs(m.weight_sparsity.item()-(1-mask.double().mean().item()))<1e-6

# ------------------------------------------------------------ kinds of chains
BN = nn.BatchNorm2d
ACTS = [nn.ReLU(), nn.GELU(), nn.SiLU(inplace=True), nn.Sigmoid(), nn.Hardswish(), nn.Tanh()]
def convs(act, pad=1, mode='zeros', bias=False, norm=True): return nn.Sequential(nn.Conv2d(3, 8, 3, padding=pad, padding_mode=mode, bias=bias), BN(8) if norm else nn.Identity(), act,
    nn.Conv2d(8, 10, 3, padding=pad, padding_mode=mode, bias=bias), BN(10) if norm else nn.Identity(), act, nn.MaxPool2d(2), nn.Conv2d(10, 6, 1), act, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))

@pytest.mark.parametrize('act', ACTS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize('pad,mode', [(1,'zeros'), (0,'zeros'), (1,'replicate'), (1,'circular'), ('same','zeros'), ('valid','zeros')])
@pytest.mark.parametrize('bias,norm', [(True, True), (False, True), (True, False)])
def test_convs(act, pad, mode, bias, norm):
    model = lively(convs(deepcopy(act), pad, mode, bias, norm))
    sparsify_model(model, 0.3)
    kill(model[0], [1, 4, 6]); kill(model[3], [0, 2, 3], [7]); kill(model[7], [5], [9]); kill(model[11], cols=range(4, 8))
    small,cuts = same(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    padded = mode=='zeros' and pad in (1, 'same')
    const = torch.zeros(1, 8, 1, 1).double() if model[0].bias is None else model[0].bias.detach().clone()[None,:,None,None]
    sticks = padded and (norm or bias) and bool(model[2](model[1](const)).flatten()[[1, 4, 6]].any())
    assert small[0].out_channels==8-4+int(sticks) and small[3].in_channels==small[0].out_channels
    assert small[3].out_channels==10-4 and small[7].in_channels==6
    assert small[7].out_channels==6-2 and small[11].in_features==16
    assert 'weight_mask' in small[3]._buffers and small[3].weight_mask.shape==small[3].weight.shape
    if norm: assert small[1].num_features==small[0].out_channels==len(small[1].running_var)

def test_linear_norm_activation():
    model = lively(nn.Sequential(nn.Linear(5, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4, bias=False)))
    kill(model[0], [2, 8])
    small,cuts = same(model, torch.randn(3, 5).double())
    assert cuts=={'0': ((9,5),(7,5)), '4': ((4,9),(4,7))}

def test_outputs_used_twice():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 3, 1)
        def forward(self, x): x = self.a(x); return self.b(F.silu(x)) + self.c(torch.relu(x))
    model = lively(Fork())
    kill(model.a, [0, 1, 3]); kill(model.b, cols=[4]); kill(model.c, cols=[4, 5])
    model.a.bias.data[:4] = torch.tensor([1., 0.7, 2, 0.5])
    small,_ = same(model, torch.randn(2, 2, 7, 7).double())
    assert small.a.out_channels==3                                                        # 2, one of 0, 1, 3, and 5; 4 has no listener left

@pytest.mark.parametrize('biases,n', [((-1., .3), 6), ((.3, -1.), 6), ((-1., -.5), 5), ((1., .3), 5)])
def test_units_are_merged_only_if_one_serves_all_users(biases, n):
    "Through SiLU a negative constant is the largest of them, and through ReLU it is zero, while the other one is not"
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 3, padding=1), nn.Conv2d(6, 3, 1)
        def forward(self, x): x = self.a(x); return self.b(F.silu(x)) + self.c(torch.relu(x))
    torch.manual_seed(0)
    model = lively(Fork())
    kill(model.a, [1, 4])
    model.a.bias.data[[1, 4]] = torch.tensor(biases).double()
    small,_ = same(model, torch.randn(2, 2, 7, 7).double())
    assert small.a.out_channels==n

def test_a_layer_with_two_places_stays():
    "The example shows one way through the model; its other place may serve another"
    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.norm,self.leaves_early = nn.Linear(5, 8), nn.Linear(8, 5), nn.LayerNorm(8), False
            self.exit = nn.Sequential(self.a, self.norm)
        def forward(self, x): return self.exit(x) if self.leaves_early else self.b(F.relu(self.a(x)))
    torch.manual_seed(0)
    model,x = lively(Early()),torch.randn(4, 5).double()
    kill(model.a, [1, 5])
    small,cuts = shrink_model(model, x)
    assert cuts=={}
    model.leaves_early = small.leaves_early = True
    assert torch.equal(model(x), small(x))

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind,self.a,self.b,self.norm,self.other = kind, nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
    def forward(self, x):
        if self.kind=='residual': return self.b(F.relu(self.a(x)+x))
        if self.kind=='layernorm': return self.b(self.norm(self.a(x)))
        if self.kind=='output': h = self.a(x); return self.b(F.relu(h))+h.sum()
        if self.kind=='twice': return self.b(self.a(F.relu(self.a(x))))
        if self.kind=='cat': h = self.a(x); return self.b(torch.cat([h[:,:4], h[:,4:]], 1))
        if self.kind=='softmax': return self.b(self.a(x).softmax(-1))
        if self.kind=='view': return self.b(self.a(x).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8))
        if self.kind=='data': return self.b(F.relu(self.a(x))) if x.sum()>0 else self.b(F.relu(self.a(x)))
        if self.kind=='tokens': return self.b(F.gelu(self.a(x)).flatten(1)[:,:8])
        if self.kind=='weight': return self.b(F.relu(self.a(x))) + self.a.weight.sum()
        if self.kind=='tied': return self.b(F.relu(self.a(x))) + self.other(x)

@pytest.mark.parametrize('kind', ['residual','layernorm','output','twice','cat','softmax','view','data','tokens','weight','tied'])
def test_what_is_no_chain_stays(kind):
    model = lively(Net(kind))
    if kind=='tied': model.other.weight = model.a.weight
    kill(model.a, [1, 5])
    x = torch.randn(4, 8).double()
    small,cuts = shrink_model(model, x if kind!='tokens' else torch.randn(4, 3, 8).double())
    assert cuts=={} and not changed(snapshot(model), snapshot(small))

def test_linear_on_columns_of_an_image():
    "No flattening: what looks like channels is a dimension of the image"
    model = lively(nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Linear(6, 4)))
    kill(model[0], [3])
    small,cuts = shrink_model(model, torch.randn(2, 2, 5, 6).double())
    assert cuts=={}

def test_parts_of_what_cannot_be_traced():
    class Outer(nn.Module):
        def __init__(self): super().__init__(); self.ff = nn.Sequential(mlp(8, 12, 8), nn.Identity())
        def forward(self, x): return x+self.ff(x) if x.sum()>-1e9 else x
    model = lively(Outer())
    kill(model.ff[0][0], [3, 4])
    small,cuts = same(model, torch.randn(2, 5, 8).double())
    assert cuts=={'ff.0.0': ((12,8),(10,8)), 'ff.0.2': ((8,12),(8,10))}

def test_all_dead():
    model = lively(mlp(4, 6, 3))
    kill(model[0], range(6))
    small,cuts = same(model, torch.randn(2, 4).double())
    assert len(small[0].weight)==1

def test_bias_of_a_layer_without_one():
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False)))
    kill(model[0], [0])
    small,_ = same(model, torch.randn(2, 4).double())
    assert small[2].bias is not None

def test_modes_and_hooks_stay():
    model = lively(mlp(4, 9, 3)).train()
    sparsify_model(model, 0.5)
    kill(model[0], [1])
    small,_ = shrink_model(model, torch.randn(2, 4).double())
    assert small.training and small[0].training and small[0]._forward_pre_hooks and 'weight_sparsity' in small[0]._buffers
    with torch.no_grad():
        for p in small.parameters(): p.fill_(1.)
    small(torch.randn(2, 4).double())
    assert all((p[~m]==0).all() for *_,p,m in masked_params(small))

def test_a_smaller_file_and_back(tmp_path):
    model = lively(convs(nn.ReLU()))
    sparsify_model(model, 0.5)
    kill(model[0], [1, 4, 6]); kill(model[3], [0, 2])
    x = torch.randn(2, 3, 12, 12).double()
    small,_ = shrink_model(model, x)
    whole,part = save_sparse(model, tmp_path/'a'),save_sparse(small, tmp_path/'b')
    fresh = convs(nn.ReLU()).double().eval()
    load_sparse(part, shape_like(fresh, load_sparse(part)))
    assert torch.equal(fresh(x), small(x)) and part.stat().st_size<whole.stat().st_size

def test_a_linear_layer_gets_a_bias():
    "A cut constant went to the bias of a layer that had none"
    make = lambda: lively(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False)))
    kill((model := make())[0], [0])
    small,_ = same(model, x := torch.randn(2, 4).double())
    fresh = shape_like(make(), small.state_dict())
    load_sparse_state(fresh, small.state_dict())
    assert fresh[2].bias is not None and torch.equal(fresh(x), small(x))

@pytest.mark.parametrize('take', [lambda learn, x: shrink_model(learn, x)[0], lambda learn, x: shape_like(learn, {})])
def test_learners(take):
    class Wrapped: model = lively(mlp(4, 6, 3))
    kill(Wrapped.model[0], [1])
    x = torch.randn(2, 4).double()
    assert isinstance(small := take(Wrapped(), x), nn.Sequential) and torch.allclose(small(x), Wrapped.model(x))

def test_timm_and_fastai():
    timm = pytest.importorskip('timm')
    from fastai.layers import ConvLayer, Flatten
    torch.manual_seed(0)
    r = lively(timm.create_model('resnet18', num_classes=3))
    kill(r.layer1[0].conv1, range(9)); kill(r.layer2[1].conv2, cols=range(4))
    _,cuts = same(r, torch.randn(1, 3, 32, 32).double())
    assert set(cuts)=={'layer1.0.conv1','layer1.0.conv2','layer2.1.conv1','layer2.1.conv2'} and cuts['layer2.1.conv1'][1][0]==124
    v = lively(timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3))
    kill(v.blocks[0].mlp.fc1, range(5))
    _,cuts = same(v, torch.randn(1, 3, 32, 32).double())
    assert cuts['blocks.0.mlp.fc1'][1][0]==768-5 and len(cuts)==2
    f = lively(nn.Sequential(ConvLayer(1, 8), ConvLayer(8, 6), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(6, 2)))
    kill(f[1][0], [2, 3])
    _,cuts = same(f, torch.randn(2, 1, 8, 8).double())
    assert cuts['1.0'][1][0]==4 and cuts['4'][1]==(2, 4)

def test_a_model_that_differs_each_time_is_refused():
    class Noise(nn.Module):
        def forward(self, x): return x+torch.randn_like(x)
    with pytest.raises(RuntimeError, match='the same twice'): shrink_model(nn.Sequential(mlp(4, 3, 2), Noise()), torch.randn(2, 4))
