"Layers that compute on active weights only: the same function, gradients, state and training as masked layers"
import copy, pickle
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from helpers import *
from sparsefast.core import *
from sparsefast.layers import SparseConv2d, SparseLinear
from sparsefast.sparse_ops import check_index, index_of, positions, product, sampled, transposed_index

def random_index(rows, n_col, density, seed=0):
    mask = torch.rand(rows, n_col, generator=torch.Generator().manual_seed(seed))<density
    return mask, *index_of(mask)

def masked(layer, sparsity=.7):
    sparsify_model(layer, sparsity)
    return layer

def twin_of(layer): return (SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear).from_masked(layer)

# ------------------------------------------------------------ products
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, .1, .5, 1]), st.integers(0, 99))
def test_index(rows, n_col, density, seed):
    mask,crow,col = random_index(rows, n_col, density, seed)
    assert crow.dtype==col.dtype==torch.int32 and len(crow)==rows+1
    assert positions(crow, col, n_col).equal(mask.flatten().nonzero().squeeze(1))
    check_index(crow, col, int(mask.sum()), mask.shape)
    t_crow,t_col,perm = transposed_index(crow, col, n_col)
    assert (want := index_of(mask.t()))[0].equal(t_crow) and want[1].equal(t_col)
    assert torch.arange(rows*n_col).view(rows, n_col)[mask][perm].equal(torch.arange(rows*n_col).view(rows, n_col).t()[mask.t()])

def test_more_columns_than_16_bits():
    mask,crow,col = random_index(3, 40000, .01)
    assert positions(*transposed_index(crow, col, 40000)[:2], 3).equal(mask.t().flatten().nonzero().squeeze(1))

@pytest.mark.parametrize('n', [0, 1, 2, 127, 128, 129, 400])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('density', [0, .3, 1])
def test_products(n, dtype, density):
    mask,crow,col = random_index(7, 5, density)
    w,x,g = (torch.randn(7, 5)*mask).to(dtype), torch.randn(5, n).to(dtype), torch.randn(7, n).to(dtype)
    tol = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(product(crow, col, w[mask], x).double(), w.double()@x.double(), rtol=tol, atol=tol)
    assert torch.allclose(product(crow, col, w[mask], x.t().contiguous().t()).double(), w.double()@x.double(), rtol=tol, atol=tol)
    got = sampled(crow, col, [(g, x), (2*g, x)])
    assert torch.allclose(got.double(), 3*(g.double()@x.double().t())[mask], rtol=tol, atol=100*tol)

BAD = dict(first=(0, lambda c: c.add_(1)), falls=(0, lambda c: c.__setitem__(1, 99)), high=(1, lambda c: c.__setitem__(0, 5)), low=(1, lambda c: c.__setitem__(0, -1)),
           twice=(1, lambda c: c.__setitem__(1, int(c[0]))), dtype=(1, lambda c: c.long()), short=(1, lambda c: c[:-1]), rows=(0, lambda c: c[:-1]))
@pytest.mark.parametrize('bad', BAD)
def test_bad_index(bad):
    mask,crow,col = random_index(7, 5, .9)
    i,f = BAD[bad]
    index = [crow.clone(), col.clone()]
    out = f(index[i])
    if out is not None: index[i] = out
    with pytest.raises(ValueError): check_index(*index, int(mask.sum()), mask.shape)

# ------------------------------------------------------------ one layer
CONVS = dict(pointwise=dict(kernel_size=1), strided=dict(kernel_size=1, stride=2), padded=dict(kernel_size=1, padding=1), three=dict(kernel_size=3, padding=1), stride=dict(kernel_size=3, stride=2, padding=1),
             dilated=dict(kernel_size=3, dilation=2), same=dict(kernel_size=(2,3), padding='same'), uneven=dict(kernel_size=(3,1), stride=(1,2), padding=(0,2)), five=dict(kernel_size=5, stride=3, padding=2),
             reflect=dict(kernel_size=3, padding=1, padding_mode='reflect'), circular=dict(kernel_size=3, padding=(2,1), padding_mode='circular'), nobias=dict(kernel_size=3, bias=False))
LAYERS = {'linear': (lambda dt: nn.Linear(9, 13, dtype=dt), (6,9)), 'linear without bias': (lambda dt: nn.Linear(9, 13, bias=False, dtype=dt), (6,9)), 'tokens': (lambda dt: nn.Linear(9, 13, dtype=dt), (2,3,9)),
          'one': (lambda dt: nn.Linear(9, 13, dtype=dt), (9,)), 'single': (lambda dt: nn.Linear(9, 13, dtype=dt), (1,9)), 'many': (lambda dt: nn.Linear(9, 13, dtype=dt), (300,9)), 'none': (lambda dt: nn.Linear(9, 13, dtype=dt), (0,9)),
          **{f'conv {n}': (lambda dt, kw=kw: nn.Conv2d(4, 6, dtype=dt, **kw), (2,4,9,11)) for n,kw in CONVS.items()}, 'conv without batch': (lambda dt: nn.Conv2d(4, 6, 3, dtype=dt), (4,9,11)), 'conv no images': (lambda dt: nn.Conv2d(4, 6, 3, dtype=dt), (0,4,9,11)),
          'conv large': (lambda dt: nn.Conv2d(4, 6, 3, padding=1, dtype=dt), (1,4,30,200)), 'conv channels last': (lambda dt: nn.Conv2d(4, 6, 3, padding=1, dtype=dt), (2,4,9,11))}

def gradients(layer, x):
    x = x.clone().requires_grad_()
    if layer.bias is not None: layer.bias.grad = None
    y = layer(x)
    (y*torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    w = layer.values.grad if hasattr(layer, 'values') else layer.weight.grad[layer.weight_mask]
    return [y, x.grad, w] + ([layer.bias.grad.clone()] if layer.bias is not None else [])

@pytest.mark.parametrize('case', LAYERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_same_function_and_gradients(case, dtype):
    make,size = LAYERS[case]
    layer,x = masked(make(dtype)),torch.randn(*size, dtype=dtype)
    if case=='conv channels last': x = x.to(memory_format=torch.channels_last)
    sparse = twin_of(layer)
    with torch.no_grad(): assert torch.allclose(sparse(x), layer(x), atol=1e-5 if dtype==torch.float32 else 1e-13)
    for a,b in zip(gradients(sparse, x), gradients(layer, x)):
        assert a.shape==b.shape and a.dtype==b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-3 if dtype==torch.float32 else 1e-11)
    assert sparse.values.grad.shape==sparse.values.shape

@pytest.mark.parametrize('case', [k for k in LAYERS if k not in ('none', 'many', 'conv large', 'conv no images')])
def test_gradcheck(case):
    make,size = LAYERS[case]
    sparse,x = twin_of(masked(make(torch.float64))),torch.randn(*size, dtype=torch.float64, requires_grad=True)
    f = lambda x,*ps: torch.func.functional_call(sparse, dict(zip(dict(sparse.named_parameters()), ps)), (x,))
    assert torch.autograd.gradcheck(f, (x, *sparse.parameters()))

@pytest.mark.parametrize('case', ['linear', 'tokens', 'conv pointwise', 'conv three'])
def test_bfloat16(case):
    make,size = LAYERS[case]
    layer,x = masked(make(torch.bfloat16)),torch.randn(*size, dtype=torch.bfloat16)
    for a,b in zip(gradients(twin_of(layer), x), gradients(layer, x)): assert a.dtype==torch.bfloat16 and (a-b).norm()<=.02*b.norm()

@pytest.mark.parametrize('sparsity', [0., 1.])
def test_all_or_none(sparsity):
    layer = nn.Linear(5, 4)
    sparsify_model(layer, .5)
    layer.weight_mask.fill_(sparsity==0.)
    x = torch.randn(3, 5)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(gradients(twin_of(layer), x), gradients(layer, x)))

def test_autocast():
    sparse,x = twin_of(masked(nn.Linear(9, 13))),torch.randn(6, 9)
    with torch.autocast('cpu', torch.bfloat16): y = sparse(x.bfloat16())
    assert y.dtype==torch.float32 and torch.allclose(y, sparse(x.bfloat16().float()))
    y.sum().backward()
    assert sparse.values.grad.dtype==torch.float32

def test_frozen():
    layer = nn.Linear(9, 13)
    layer.weight.requires_grad_(False)
    sparse = twin_of(masked(layer))
    assert not sparse.values.requires_grad and not sparse.to_masked().weight.requires_grad
    sparse(torch.randn(2, 9)).sum().backward()
    assert sparse.values.grad is None and sparse.bias.grad is not None

def test_column_layout_is_handed_on():
    "From layer to layer no activation is transposed"
    net = nn.Sequential(twin_of(masked(nn.Linear(9, 13))), nn.ReLU(), twin_of(masked(nn.Linear(13, 5))))
    hidden = net[:2](torch.randn(6, 9))
    assert hidden.t().is_contiguous() and net[2]._run(hidden.t().unsqueeze(0)).is_contiguous()
    assert twin_of(masked(nn.Linear(9, 13)))(torch.randn(2, 3, 9)).is_contiguous()

# ------------------------------------------------------------ to and fro
@pytest.mark.parametrize('case', [k for k in LAYERS if k not in ('none', 'many', 'tokens', 'one')])
def test_round_trip(case):
    layer = masked(LAYERS[case][0](torch.float32))
    back = twin_of(layer).to_masked()
    assert type(back) is type(layer) and back.extra_repr()==layer.extra_repr() and list(back.state_dict())==list(layer.state_dict())
    assert not changed(snapshot(layer), snapshot(back)) and back.bias is layer.bias
    back.weight.data.add_(1.)
    back(torch.randn(LAYERS[case][1]))
    assert masked_are_zero(back)                                             # masks are enforced as before
    back.load_state_dict(layer.state_dict())

def test_round_trip_without_enforcement():
    layer = nn.Linear(9, 13)
    sparsify_model(layer, .5, enforce_mask=False)
    assert not twin_of(layer).to_masked()._forward_pre_hooks

def test_hooks_and_mode_are_kept():
    layer,seen = masked(nn.Linear(9, 13)).eval(),[]
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(type(m)))
    sparse = twin_of(layer)
    sparse(torch.randn(2, 9)), sparse.to_masked()(torch.randn(2, 9))
    assert seen==[SparseLinear, nn.Linear] and not sparse.training and not sparse.to_masked().training

def test_hugging_face_conv1d():
    Conv1D = pytest.importorskip('transformers.pytorch_utils').Conv1D
    layer,x = masked(Conv1D(13, 9)),torch.randn(4, 9)
    sparse = twin_of(layer)
    assert type(sparse) is SparseLinear and sparse.in_features==9 and sparse.out_features==13
    for a,b in zip(gradients(sparse, x), gradients(layer, x)): assert torch.allclose(a, b, atol=1e-5)
    assert not changed(snapshot(layer), snapshot(sparse.to_masked())) and type(sparse.to_masked()) is Conv1D

REFUSED = dict(dense=(nn.Linear(3, 4), 'no mask'), other=(masked(nn.Conv1d(3, 4, 1)), 'is for'), sub=(masked(type('Mine', (nn.Linear,), {})(3, 4)), 'not Mine'), store=(nn.Linear(3, 4), 'outside its mask'))
sparsify_model(REFUSED['store'][0], .5, keep_dense=True)
@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
    with pytest.raises(ValueError, match=REFUSED[case][1]): SparseLinear.from_masked(REFUSED[case][0])

def test_groups_refused():
    with pytest.raises(ValueError, match='2 groups'): SparseConv2d.from_masked(masked(nn.Conv2d(4, 4, 3, groups=2)))
    with pytest.raises(ValueError, match='not Linear'): SparseConv2d.from_masked(masked(nn.Linear(4, 4)))

@pytest.mark.parametrize('case,size', [('linear', (3,8)), ('conv three', (2,3,9,9)), ('conv three', (2,4,1,1)), ('conv three', (5,))])
def test_wrong_input(case, size):
    layer = twin_of(masked(LAYERS[case][0](None) if case=='linear' else nn.Conv2d(4, 6, 3)))
    with pytest.raises(ValueError, match=r'not a tensor of shape|too small'): layer(torch.randn(*size))

# ------------------------------------------------------------ state
@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float(), lambda m: m.to('cpu')])
@pytest.mark.parametrize('case', ['linear', 'conv three'])
def test_copies(how, case):
    make,size = LAYERS[case]
    sparse,x = twin_of(masked(make(None))),torch.randn(*size)
    sparse.keep_gradient()
    want = gradients(sparse, x)
    new = how(sparse)
    new.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a,b in zip(gradients(new, x), want)) and new.crow.dtype==torch.int32

def test_state_holds_values_and_index_only():
    sparse = twin_of(masked(nn.Linear(100, 50), .9))
    assert {k: v.numel() for k,v in sparse.state_dict().items()}=={'values': 500, 'bias': 50, 'weight_sparsity': 1, 'crow': 51, 'col': 500}

@pytest.mark.parametrize('assign', [False, True])
@pytest.mark.parametrize('sparsity', [.7, .9])
def test_load_state(assign, sparsity):
    a,b,x = twin_of(masked(nn.Linear(9, 13))),twin_of(masked(nn.Linear(9, 13), sparsity)),torch.randn(4, 9)
    p = a.values
    a(x).sum().backward()
    a.load_state_dict(b.state_dict(), assign=assign)
    assert (a.values is p or assign) and a.weight.equal(b.weight) and a.weight_mask.equal(b.weight_mask)
    for t in (a, b): t.zero_grad(set_to_none=True)
    assert all(torch.equal(i, j) for i,j in zip(gradients(a, x), gradients(b, x)))
    b.values.data.add_(1.)
    b.col.add_(100)
    assert assign or not a.weight.equal(b.values) and a.col.max()<9

def hostile(sd, what):
    sd = {k: v.clone() for k,v in sd.items()}
    if what=='column': sd['col'][0] = 9
    if what=='missing': del sd['crow']
    if what=='length': sd['values'] = sd['values'][:-1]
    if what=='matrix': sd['values'] = sd['values'][None]
    if what=='rows': sd['crow'] = torch.cat([sd['crow'], sd['crow'][-1:]])
    return sd
@pytest.mark.parametrize('what', ['column', 'missing', 'length', 'matrix', 'rows'])
@pytest.mark.parametrize('strict', [True, False])
def test_wrong_state_is_refused(what, strict):
    a,b = twin_of(masked(nn.Linear(9, 13))),twin_of(masked(nn.Linear(9, 13)))
    before = snapshot(a)
    with pytest.raises(RuntimeError, match='row|column|missing|values'): a.load_state_dict(hostile(b.state_dict(), what), strict=strict)
    assert not changed(before, snapshot(a))

# ------------------------------------------------------------ the gradient of all weights
@pytest.mark.parametrize('case', ['linear', 'tokens', 'single', 'many', 'conv pointwise', 'conv strided', 'conv three', 'conv stride', 'conv dilated', 'conv same', 'conv reflect', 'conv without batch'])
@pytest.mark.parametrize('passes', [1, 3])
def test_dense_gradient(case, passes):
    make,size = LAYERS[case]
    layer,other = masked(make(torch.float64)),None
    sparse = twin_of(layer)
    sparse.keep_gradient()
    sparse(torch.randn(*size, dtype=torch.float64)).sum().backward()           # an earlier step, forgotten with its gradient
    sparse.values.grad = None
    for i in range(passes):
        x = torch.randn(*size, dtype=torch.float64)
        for l in (layer, sparse): (l(x)*(i+1)).square().sum().backward()
    assert torch.allclose(sparse.dense_gradient(), layer.weight.grad, rtol=1e-10, atol=1e-10)
    sparse.values.grad.mul_(.125)                                            # unscaled or clipped
    assert torch.allclose(sparse.dense_gradient(), layer.weight.grad/8, rtol=1e-10, atol=1e-10)
    sparse.keep_gradient(False)
    sparse(x).sum().backward()
    assert not sparse._held

def test_dense_gradient_of_a_layer_used_twice():
    layer,x = masked(nn.Linear(9, 9, dtype=torch.float64)),torch.randn(5, 9, dtype=torch.float64)
    sparse = twin_of(layer)
    sparse.keep_gradient()
    for l in (layer, sparse): l(l(x).relu()).square().sum().backward()
    assert torch.allclose(sparse.dense_gradient(), layer.weight.grad)

def test_dense_gradient_under_checkpointing():
    from torch.utils.checkpoint import checkpoint
    layer,x = masked(nn.Linear(9, 9, dtype=torch.float64)),torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    sparse = twin_of(layer)
    sparse.keep_gradient()
    for l in (layer, sparse): checkpoint(l, checkpoint(l, x, use_reentrant=False).relu(), use_reentrant=False).square().sum().backward()
    assert torch.allclose(sparse.dense_gradient(), layer.weight.grad)

def test_zeroed_gradients_are_forgotten():
    sparse,layer,x = None,masked(nn.Linear(9, 13, dtype=torch.float64)),torch.randn(5, 9, dtype=torch.float64)
    sparse = twin_of(layer)
    sparse.keep_gradient()
    sparse(torch.ones_like(x)).sum().backward()
    sparse.zero_grad(set_to_none=False)
    for l in (layer, sparse): l(x).square().sum().backward()
    assert len(sparse._held)==1 and torch.allclose(sparse.dense_gradient(), layer.weight.grad)

def test_changed_gradients_are_refused():
    sparse = twin_of(masked(nn.Linear(9, 13)))
    sparse.keep_gradient()
    sparse(torch.randn(5, 9)).square().sum().backward()
    sparse.values.grad.clamp_(-.1, .1)
    with pytest.raises(ValueError, match='not what its backward passes gave'): sparse.dense_gradient()
    with pytest.raises(ValueError, match='has not kept'): twin_of(masked(nn.Linear(9, 13))).dense_gradient()
