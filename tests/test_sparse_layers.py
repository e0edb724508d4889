"Layers that compute on active weights only: the same function, gradients, state and training as masked layers"
import copy, pickle
from functools import partial
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from fastai import optimizer as fo
from sparsefast.all import *
from sparsefast import presets
from sparsefast.storage import update
from sparsefast.storage import SparseConv1d, SparseConv2d, SparseLayer, SparseLinear, to_masked_layers, to_sparse_layers
from sparsefast.utils import attribute
from sparsefast.methods import DSTMethod
from sparsefast.optim import opt_state
from sparsefast.scores import gradient_magnitude, reads, weight_and_gradient
from sparsefast.storage import kernels, planes
from sparsefast.storage.kernels import check_index, index_of, positions, sddmm, spmm, transposed_index
from helpers import *

of_cpus = pytest.mark.skipif('config.getoption("--device")', reason='what only a processor does')
without_default_device = pytest.mark.skipif('config.getoption("--device")', reason="fastai's metrics want torch's default device to be the CPU")

def random_index(rows, n_col, density, seed=0):
    mask = (torch.rand(rows, n_col, generator=torch.Generator().manual_seed(seed), device='cpu')<density).to(torch.get_default_device())
    return mask, *index_of(mask)

def masked(layer, sparsity=.7):
    sparsify_model(layer, sparsity, depthwise=True)
    return layer

def twin_of(layer): return {nn.Conv1d: SparseConv1d, nn.Conv2d: SparseConv2d}.get(type(layer), SparseLinear).from_masked(layer)

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
    w,x,g,b = (t.to(dtype) for t in (torch.randn(7, 5)*mask, torch.randn(n, 5), torch.randn(n, 7), torch.randn(7)))
    tol = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    near = partial(torch.allclose, rtol=tol, atol=tol)
    want = F.linear(x.double(), w.double(), b.double())
    for inputs in (x, x.t().contiguous().t()): assert near(spmm(crow, col, w[mask], inputs, b).double(), want)
    assert near(spmm(crow, col, w[mask], x, b, g, relu=True).double(), (want+g.double()).relu())
    assert torch.allclose(sddmm(crow, col, g, x).double(), (g.double().t()@x.double())[mask], rtol=tol, atol=100*tol)

def test_a_score_that_reads_gradients_only_sees_no_weights():
    layer = SparseLinear.from_masked(masked(nn.Linear(6, 5)))
    had,grad = layer.values.detach().clone(), torch.randn(5, 6)
    w,_ = layer.as_layer()._shown(gradient_magnitude, None, grad)
    assert w.shape==(5, 6) and w.untyped_storage().nbytes()==4 and gradient_magnitude(w).equal(grad.abs())
    assert layer.values.equal(had) and layer.values.grad is None and gradient_magnitude.reads==('gradient',)

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
             reflect=dict(kernel_size=3, padding=1, padding_mode='reflect'), circular=dict(kernel_size=3, padding=(2,1), padding_mode='circular'), nobias=dict(kernel_size=3, bias=False),
             groups=dict(kernel_size=3, padding=1, groups=2), depthwise=dict(kernel_size=5, stride=2, padding=1, groups=4, out_channels=8), far=dict(kernel_size=3, padding=4, dilation=4, stride=(3,2)))
LAYERS = {'linear': (lambda dt: nn.Linear(9, 13, dtype=dt), (6,9)), 'linear without bias': (lambda dt: nn.Linear(9, 13, bias=False, dtype=dt), (6,9)), 'tokens': (lambda dt: nn.Linear(9, 13, dtype=dt), (2,3,9)),
          'one': (lambda dt: nn.Linear(9, 13, dtype=dt), (9,)), 'single': (lambda dt: nn.Linear(9, 13, dtype=dt), (1,9)), 'many': (lambda dt: nn.Linear(9, 13, dtype=dt), (300,9)), 'none': (lambda dt: nn.Linear(9, 13, dtype=dt), (0,9)),
          **{f'conv {n}': (lambda dt, kw=kw: nn.Conv2d(4, dtype=dt, **{'out_channels': 6, **kw}), (2,4,9,11)) for n,kw in CONVS.items()}, 'conv1d': (lambda dt: nn.Conv1d(4, 6, 3, padding=2, dtype=dt), (2,4,30)), 'conv1d thinned': (lambda dt: nn.Conv1d(4, 6, 1, stride=3, groups=2, dtype=dt), (2,4,31)), 'conv thinned': (lambda dt: nn.Conv2d(4, 6, 1, stride=(3,2), dtype=dt), (2,4,10,7)), 'conv1d strided': (lambda dt: nn.Conv1d(4, 6, 5, stride=2, padding=1, dilation=2, groups=2, dtype=dt), (3,4,31)),
          'conv1d reflect': (lambda dt: nn.Conv1d(4, 6, 3, padding=1, padding_mode='reflect', dtype=dt), (2,4,8)), 'conv1d without batch': (lambda dt: nn.Conv1d(4, 6, 3, padding=1, dtype=dt), (4,8)),
          'conv without batch': (lambda dt: nn.Conv2d(4, 6, 3, dtype=dt), (4,9,11)), 'conv no images': (lambda dt: nn.Conv2d(4, 6, 3, dtype=dt), (0,4,9,11)),
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

@pytest.mark.parametrize('case', [k for k in LAYERS if k not in ('none', 'conv no images')])
@pytest.mark.filterwarnings('ignore')
def test_traced(case):
    make,size = LAYERS[case]
    sparse,x = twin_of(masked(make(torch.float64))),torch.randn(*size, dtype=torch.float64)
    traced = torch.jit.trace(sparse, x)
    assert traced(-x).dtype==x.dtype and torch.allclose(traced(-x), sparse(-x), atol=1e-13)
    with torch.no_grad(): sparse.values += 1                                 # a trace knows the values by reference
    assert torch.allclose(traced(x), sparse(x), atol=1e-13)

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
    with torch.autocast(x.device.type, torch.bfloat16): y = sparse(x.bfloat16())
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

def test_a_single_image_in_channels_last():
    layer,x = masked(nn.Conv2d(4, 6, 3, padding=1)),torch.randn(1, 4, 9, 11).to(memory_format=torch.channels_last)
    for a,b in zip(gradients(twin_of(layer), x), gradients(layer, x)): assert torch.allclose(a, b, atol=1e-4)

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
    assert torch.allclose(torch.jit.trace(sparse, x)(-x), layer(-x), atol=1e-5)

REFUSED = dict(dense=(nn.Linear(3, 4), 'no mask'), other=(masked(nn.Conv1d(3, 4, 1)), 'must be an nn.Linear'), sub=(masked(type('Mine', (nn.Linear,), {})(3, 4)), 'got Mine'), store=(nn.Linear(3, 4), 'outside its mask'))
sparsify_model(REFUSED['store'][0], .5, keep_dense=True)
@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
    with pytest.raises(ValueError, match=REFUSED[case][1]): SparseLinear.from_masked(REFUSED[case][0])

def test_other_layers_refused():
    with pytest.raises(ValueError, match='got Conv3d'): SparseConv2d.from_masked(masked(nn.Conv3d(4, 4, 3)))
    with pytest.raises(ValueError, match='got Linear'): SparseConv2d.from_masked(masked(nn.Linear(4, 4)))

@pytest.mark.parametrize('case,size', [('linear', (3,8)), ('conv three', (2,3,9,9)), ('conv three', (2,4,1,1)), ('conv three', (5,))])
def test_wrong_input(case, size):
    layer = twin_of(masked(LAYERS[case][0](None) if case=='linear' else nn.Conv2d(4, 6, 3)))
    with pytest.raises(ValueError, match=r'got shape|no smaller'): layer(torch.randn(*size))

# ------------------------------------------------------------ state
@pytest.mark.parametrize('how', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float(), lambda m: m.to(m.values.device)])
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
    with pytest.raises(RuntimeError, match='row|col|missing|values'): a.load_state_dict(hostile(b.state_dict(), what), strict=strict)
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

@pytest.mark.parametrize('case', [c for c in LAYERS if c not in ('none', 'conv no images')])
@pytest.mark.parametrize('n', [1, 2, 5])
def test_rows_of_the_dense_gradient(case, n):
    make,size = LAYERS[case]
    sparse = twin_of(masked(make(torch.float64)))
    sparse.keep_gradient()
    for _ in range(2): sparse(torch.randn(*size, dtype=torch.float64)).square().sum().backward()
    sparse.values.grad.mul_(.5)
    whole,at = sparse.dense_gradient(),0
    for rows,some in sparse.dense_gradients(n):
        assert rows.start==at and torch.allclose(some, whole[rows], rtol=1e-12, atol=1e-12)
        at = rows.stop
    assert at==len(whole)

def test_rows_that_a_score_sees():
    "Weights, gradient and optimizer state of some rows, and nothing of the layer is touched"
    layer = SparseLinear.from_masked(masked(nn.Linear(6, 5)))
    opt,l = torch.optim.Adam([layer.values]),layer.as_layer()
    layer.values.grad = torch.rand(len(layer.values))
    opt.step()
    had,weight,moment = layer.values.detach().clone(), layer.weight.detach(), opt.state[layer.values]['exp_avg'].clone()
    dense,rows,grad = torch.zeros(5, 6).masked_scatter_(layer.weight_mask, moment), slice(1, 4), torch.randn(3, 6)
    w,view = l._shown(weight_and_gradient, opt, grad, rows)
    assert w.equal(weight[rows]) and w.grad is grad and opt_state(view, w)['exp_avg'].equal(dense[rows]) and opt_state(view, w)['step']==1
    assert layer.values.equal(had) and opt.state[layer.values]['exp_avg'].equal(moment) and list(opt.state)==[layer.values]

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
    with pytest.raises(ValueError, match='holds nothing'): twin_of(masked(nn.Linear(9, 13))).dense_gradient()

# ------------------------------------------------------------ models there and back
def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 40, dtype=dtype), nn.ReLU(), nn.Linear(40, 30, dtype=dtype), nn.ReLU(), nn.Linear(30, 3, dtype=dtype))

def pair(method=None, sparsity=.8, make=net, **kw):
    "A masked model and the same one with sparse layers"
    both = [make(), make()]
    for m in both:
        torch.manual_seed(7)
        sparsify_model(m, sparsity, **{**(method.start(sparsity) if method else {}), **kw})
    to_sparse_layers(both[1], least=0.)
    return both

def sparse_modules(model): return [m for m in model.modules() if isinstance(m, SparseLayer)]
def stored(model): return [(m.weight.detach(), m.weight_mask, m.values) for m in sparse_modules(model)]

def assert_same(masked_model, model, opts=None, tol=1e-9):
    "The same masks, weights and optimizer state"
    ours = stored(model)
    assert len(ours)==len(sparse_params(masked_model))
    for (p,mask,_),(w,m,v) in zip(sparse_params(masked_model), ours):
        assert torch.equal(mask, m) and torch.allclose(p, w, rtol=tol, atol=tol)
        if not opts: continue
        a,b = opt_tensors(opts[0], p),opt_tensors(opts[1], v)
        assert set(a)==set(b) and all(torch.allclose(a[k][mask], b[k], rtol=tol, atol=tol) for k in a)
    rest = {k: v for k,v in masked_model.state_dict().items() if k.endswith('bias')}
    assert all(torch.allclose(v, model.state_dict()[k], rtol=tol, atol=tol) for k,v in rest.items())

def test_model_there_and_back():
    model = net()
    sparsify_model(model, .8, sparsities={-1: .5})
    before = snapshot(model)
    assert to_sparse_layers(model)==['0', '2'] and type(model[4]) is nn.Linear
    assert to_masked_layers(model)==['0', '2'] and to_masked_layers(model)==[] and not changed(before, snapshot(model))

@pytest.mark.parametrize('opt', [*TORCH_OPTS, 'fastai adam', 'fastai wrapper'])
def test_optimizer_goes_along(opt):
    from fastai.optimizer import Adam as FastaiAdam, OptimWrapper
    a,b = net(),net()
    for m in (a, b): torch.manual_seed(7), sparsify_model(m, .8)
    make = {'fastai adam': lambda ps: FastaiAdam(list(ps), lr=.01), 'fastai wrapper': lambda ps: OptimWrapper(list(ps), opt=torch.optim.AdamW, lr=.01)}.get(opt) or TORCH_OPTS[opt]
    opts = [make(m.parameters()) for m in (a, b)]
    method = DSTMethod(**{**RigL_presets, 'batches_per_update': 20})
    for step,(x,y) in enumerate(batches(60, dtype=torch.float64), 1):
        if step==10: to_sparse_layers(b, opts[1])
        if step in (10, 50): assert_same(a, b, opts)
        if step==50:
            to_masked_layers(b, opts[1])
            assert not [k for k,t in snapshot(b, opts[1]).items() if not torch.allclose(t, snapshot(a, opts[0])[k], rtol=1e-9, atol=1e-9)]
        for m,o in zip((a, b), opts):
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
            method.step(m, o, step, (step-1)/60)
    assert same_masks(masks(a), masks(b)) and all(torch.allclose(p, q, rtol=1e-9, atol=1e-9) for p,q in zip(a.parameters(), b.parameters()))

def test_what_stays_masked():
    model = nn.ModuleDict(dict(attn=nn.MultiheadAttention(8, 2), up=nn.ConvTranspose2d(4, 4, 3), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 20), table=nn.Embedding(20, 8), conv3=nn.Conv3d(4, 4, 3)))
    model['b'].weight,model['table'].weight = model['a'].weight,nn.Parameter(model['c'].weight.data)
    model['table'].weight = model['c'].weight
    sparsify_model(model, .5)
    with pytest.raises(ValueError, match='no layer of this model'): to_sparse_layers(model, least=0.)

@pytest.mark.parametrize('model', [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4))])
def test_nothing_to_convert(model):
    with pytest.raises(ValueError, match='sparsify_model'): to_sparse_layers(model)

def test_single_layer():
    with pytest.raises(ValueError, match='from_masked'): to_sparse_layers(masked(nn.Linear(9, 13), .9))

def test_optimizers_that_cannot_follow():
    from fastai.optimizer import Adam as FastaiAdam, Lookahead
    model = net()
    sparsify_model(model, .9)
    with pytest.raises(ValueError, match='Lookahead'): to_sparse_layers(model, Lookahead(FastaiAdam(list(model.parameters()), lr=.1)))
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    opt.state[model[0].weight] = dict(row=torch.zeros(40))
    with pytest.raises(ValueError, match="'row'"): to_sparse_layers(model, opt)
    assert not sparse_modules(model)

def test_transformer_layer_in_evaluation():
    "PyTorch's own fast path takes the weights of the linear layers"
    layer,x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(),torch.randn(2, 5, 16)
    sparsify_model(layer, .8)
    with torch.no_grad(): want = layer(x)
    assert to_sparse_layers(layer)==['linear1', 'linear2']
    with torch.no_grad(): assert torch.allclose(layer(x), want, atol=1e-5)

# ------------------------------------------------------------ the same training
SUPPORTED = {n.removesuffix('_presets'): p for n,p in vars(presets).items() if n.endswith('_presets') and not p.get('explore_pct') and 'momentum' not in reads(p.get('grow_score_f', gradient_magnitude))}

def same_training(method, opt='adam', total=200, sparsity=.8, make=net, data=None, scale=None, start=None, **kw):
    a,b = pair(method, sparsity, make, **kw)
    opts = [TORCH_OPTS[opt](m.parameters()) for m in (a, b)]
    moved = 0
    for step,(x,y) in enumerate(data or batches(total, dtype=torch.float64), 1):
        for m,o in zip((a, b), opts):
            if step==1: method.check(m, o)
            if step==1: method.enforce(m, o)
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
        before = masks(a)
        for m,o in zip((a, b), opts): method.step(m, o, step, (step-1)/total)
        moved += not same_masks(before, masks(a))
        if not same_masks(before, masks(a)) or step%20==0: assert_same(a, b, opts)
    assert all(len(v)==int(mask.count_nonzero()) for _,mask,v in stored(b))
    return a,b,moved

@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'adamw'])
@pytest.mark.parametrize('preset', ['RigL', 'SET'])
def test_same_training_for_hundreds_of_steps(opt, preset):
    a,_,moved = same_training(DSTMethod(**{**PRESETS[preset], 'batches_per_update': 10, 'stop_pct': .9}), opt, 400)
    assert moved>=30

EVERY = dict(batches_per_update=10, stop_pct=.9)
@pytest.mark.parametrize('preset', SUPPORTED)
def test_same_training_by_every_method(preset):
    settings = {**SUPPORTED[preset], **(EVERY if preset not in ('Static',) else {})}
    if settings.get('grad_steps') is not None: settings['grad_steps'] = min(settings.get('grad_steps', 1), 3)
    a,b,moved = same_training(DSTMethod(**settings), 'adamw', 120, .75)
    assert (moved>0)==(preset!='Static')

@pytest.mark.parametrize('preset,kw', [('SET', dict(grad_steps=None)), ('GMP', dict(grad_steps=None)), ('GMP', dict(redistribute_f=importance_redistribution))])
def test_gradients_are_taken_where_scores_read_them(preset, kw):
    "Averages of gradients that no score reads need none; growth that a method shares out needs them though it drops nothing"
    same_training(DSTMethod(**{**SUPPORTED[preset], **EVERY, **kw}), 'momentum', 60)

@of_cpus
@pytest.mark.parametrize('preset', [p for p in SUPPORTED if p!='Static'])
def test_same_training_some_rows_at_a_time(preset, monkeypatch):
    monkeypatch.setattr(update, '_at_once', 50)                              # weights; the layers have 320, 1200 and 90
    test_same_training_by_every_method(preset)

@of_cpus
@pytest.mark.parametrize('preset', ['RigL', 'SET', 'MEST', 'GSE'])
def test_no_update_makes_a_dense_tensor(preset, monkeypatch):
    "Nothing of the weight's size but masks, which take a byte a weight"
    monkeypatch.setattr(update, '_at_once', 64)
    torch.manual_seed(0)
    model,seen = nn.Sequential(masked(nn.Linear(40, 60), .95), nn.ReLU(), nn.Linear(60, 3)), []
    to_sparse_layers(model)
    method,opt = DSTMethod(**{**SUPPORTED[preset], 'batches_per_update': 2, 'stop_pct': 1.}), torch.optim.Adam(model.parameters())
    method.enforce(model, opt)
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kw=None):
            out = f(*args, **(kw or {}))
            seen.extend((str(f), t.numel(), t.element_size()) for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t) and t.layout==torch.strided and t.untyped_storage().nbytes()>=t.numel()*t.element_size())
            return out
    for step in (1, 2):
        opt.zero_grad()
        model(torch.randn(8, 40)).square().sum().backward()
        before = model[0].weight_mask
        if step==2:
            with Watch(): method.step(model, opt, step, 0.)
        else: method.step(model, opt, step, 0.)
    assert not before.equal(model[0].weight_mask) and any(n==2400 for _,n,_ in seen)
    assert not [s for s in seen if s[1]>=1200 and s[2]>1]

def test_methods_whose_layers_change_size():
    "Pruning and redistribution: the parameter stays the same object, whatever is still held of the last graph"
    a,b = pair(method := DSTMethod(**{**SUPPORTED['GMP'], **EVERY}), .9)
    values,opt,loss,sizes = [m.values for m in sparse_modules(b)],torch.optim.Adam(b.parameters(), lr=.01),None,set()
    for step,(x,y) in enumerate(batches(100, dtype=torch.float64), 1):
        opt.zero_grad()
        loss = F.cross_entropy(b(x), y)                                      # the last one is still alive here
        loss.backward()
        method.step(b, opt, step, (step-1)/100)
        sizes.add(sum(map(len, values)))
        assert all(p.grad is None or p.grad.shape==p.shape for p in values)
    assert len(sizes)>5 and all(m.values is v for m,v in zip(sparse_modules(b), values)) and sum(map(len, values))==sum(round(.1*m.shape.numel()) for m in sparse_modules(b))

@pytest.mark.parametrize('grad_steps', [1, 4, None])
def test_same_training_with_accumulation_and_averages(grad_steps):
    method = DSTMethod(**{**RigL_presets, **EVERY, 'grad_steps': grad_steps})
    a,b = pair(method)
    opts = [TORCH_OPTS['momentum'](m.parameters()) for m in (a, b)]
    for m,o in zip((a, b), opts): method.check(m, o, 100), method.enforce(m, o)
    data = batches(300, dtype=torch.float64)
    for step in range(1, 101):
        for m,o in zip((a, b), opts):
            o.zero_grad(set_to_none=step%2==0)
            for x,y in data[3*step-3:3*step]: F.cross_entropy(m(x), y).backward()
            method.step(m, o, step, (step-1)/100)
        assert_same(a, b, opts)
    assert not any(m._held and not m.kept for m in sparse_modules(b))

@pytest.mark.parametrize('to_none', [True, False])
def test_a_part_of_a_batch_that_no_active_weight_sees_counts(to_none):
    "Its gradient is zero at all active weights, as after `zero_grad`, and not at others"
    method = DSTMethod(**{**RigL_presets, 'batches_per_update': 2, 'stop_pct': 1.})
    def make():
        torch.manual_seed(0)
        return mlp(40, 10, 3, dtype=torch.float64)
    a,b = pair(method, .95, make)
    opts = [torch.optim.SGD(m.parameters(), lr=.05) for m in (a, b)]
    for m,o in zip((a, b), opts): method.enforce(m, o)
    before,grown = masks(a),0
    for step,(x,y) in enumerate(batches(12, n_in=40, dtype=torch.float64), 1):
        unseen = torch.zeros_like(x)
        unseen[:,~a[0].weight_mask.any(0)] = 3.
        for m,o in zip((a, b), opts):
            o.zero_grad(set_to_none=to_none)
            if unseen.any(): m[0](unseen).square().sum().backward()
            F.cross_entropy(m(x), y).backward()
            method.step(m, o, step, total=13)
        grown += bool(unseen.any())
        assert_same(a, b, opts)
    assert grown and not same_masks(before, masks(a))

def test_a_dead_layer_holds_one_step():
    "Its gradient is zero whether or not it was zeroed"
    method = DSTMethod(**{**RigL_presets, 'batches_per_update': 50})
    _,b = pair(method, .9)
    opt = torch.optim.SGD(b.parameters(), lr=.05)
    method.enforce(b, opt)
    for step,(x,y) in enumerate(batches(9, dtype=torch.float64), 1):
        opt.zero_grad(set_to_none=False)
        for _ in range(2): (0*F.cross_entropy(b(x), y)).backward()
        for m in sparse_modules(b): m.kept = True
        method.step(b, opt, step, total=400)
        for m in sparse_modules(b): m.kept = True
        assert all(len(m._held)<=2 for m in sparse_modules(b))

@pytest.mark.parametrize('pattern', ['fan_in_pattern', 'drop_grow'])
@pytest.mark.parametrize('density', ['erdos_renyi_sparsity', 'uniform_sparsity'])
def test_same_training_of_convolutions(pattern, density):
    from sparsefast import distributions, patterns
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Unflatten(1, (2,2,2)), nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 16, 2), nn.Flatten(), nn.Linear(16, 3)).double()
    method = DSTMethod(**{**RigL_presets, **EVERY, 'pattern_f': getattr(patterns, pattern)})
    a,b,moved = same_training(method, 'adam', 100, .6, make, sparse_f=getattr(distributions, density))
    assert moved>5 and len(sparse_modules(b))>=3

def test_same_training_of_conv1d():
    "Weights with their outputs in the second dimension, and a pattern by outputs"
    Conv1D = pytest.importorskip('transformers.pytorch_utils').Conv1D
    def make():
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(40, 8), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), Conv1D(3, 30)).double()
    for preset in ('RigL', 'SET', 'SRigL'): assert same_training(DSTMethod(**{**SUPPORTED[preset], **EVERY}), 'adam', 60, .6, make)[2]>3

def test_mixed_storage():
    "Some layers sparse, some masked: still the same"
    a,b = net(),net()
    for m in (a, b): torch.manual_seed(7), sparsify_model(m, .8, sparsities={2: .5})
    to_sparse_layers(b, least=.7)
    assert [type(m) for m in b[::2]]==[SparseLinear, SparseLinear, nn.Linear]
    method = DSTMethod(**{**SUPPORTED['RigL'], **EVERY, 'grow_score_f': SET_presets['grow_score_f']})
    for m in (a, b): plain_loop(m, TORCH_OPTS['adam'](m.parameters()), method, 60, dtype=torch.float64)
    to_masked_layers(b)
    assert same_masks(masks(a), masks(b)) and all(torch.allclose(p, q, rtol=1e-9, atol=1e-9) for p,q in zip(a.parameters(), b.parameters()))

def test_frozen_layers_stay():
    _,b = pair()
    b[2].requires_grad_(False)
    before = snapshot(b[2])
    plain_loop(b, TORCH_OPTS['adam'](p for p in b.parameters() if p.requires_grad), DSTMethod(**{**RigL_presets, **EVERY}), 60, dtype=torch.float64)
    assert not changed(before, snapshot(b[2]))

@pytest.mark.parametrize('where', ['gradient', 'input'])
def test_nonfinite_gradients_change_nothing(where):
    _,b = pair()
    opt,method = TORCH_OPTS['adam'](b.parameters()),DSTMethod(**{**RigL_presets, 'batches_per_update': 10})
    method.enforce(b, opt)
    x,y = batches(1, dtype=torch.float64)[0]
    if where=='input': x[0,0] = float('inf')
    backward(b, x, y)
    if where=='gradient': b[0].values.grad[0] = float('nan')
    before = snapshot(b, opt)
    with pytest.warns(UserWarning, match='not finite'): method.step(b, opt, 10, .1)
    assert not changed(before, snapshot(b, opt))

@pytest.mark.parametrize('rule', [zero_state, fill_state])
def test_fresh_state_for_grown_weights(rule):
    _,b = pair()
    opt,method = TORCH_OPTS['adam'](b.parameters()),DSTMethod(**{**RigL_presets, 'batches_per_update': 10, 'reset_state_f': rule})
    for step,(x,y) in enumerate(batches(10, dtype=torch.float64), 1):
        backward(b, x, y)
        before = [(mask, w.clone(), {k: v.clone() for k,v in opt_tensors(opt, p).items()}) for m,(w,mask,p) in zip(sparse_modules(b), stored(b))]
        method.step(b, opt, step, (step-1)/100)
    for m,(mask,w,state) in zip(sparse_modules(b), before):
        new = m.weight_mask
        grown,stays = new & ~mask, new & mask
        assert grown.any() and (m.weight[grown]==0).all() and torch.equal(m.weight[stays], w[stays])
        for k,v in opt_tensors(opt, m.values).items():
            assert len(v)==len(m.values) and torch.equal(v[stays[new]], state[k][stays[mask]])
            mean = state[k][stays[mask]].mean()
            starts_at_zero = k=='exp_avg' or rule is zero_state
            assert mean>0 or k=='exp_avg'
            assert (v[grown[new]]==0).all() if starts_at_zero else (v[grown[new]]>=mean*(1-1e-12)).all()

REFUSALS = dict(SNFS=('momentum of weights', SNFS_presets), TopKAST=('outside the masks', presets.TopKAST_presets), SR_STE=('outside the masks', presets.SR_STE_presets))
@pytest.mark.parametrize('preset', REFUSALS)
@pytest.mark.parametrize('verb', ['check', 'step', 'update'])
@pytest.mark.filterwarnings('ignore:updates take')
def test_methods_that_are_refused(preset, verb):
    _,b = pair()
    opt,method = TORCH_OPTS['momentum'](b.parameters()),DSTMethod(**{**REFUSALS[preset][1], 'batches_per_update': 10})
    backward(b, *batches(1, dtype=torch.float64)[0])
    before = snapshot(b, opt)
    with pytest.raises(ValueError, match=REFUSALS[preset][0]+'.*to_masked_layers'): method.check(b, opt) if verb=='check' else getattr(method, verb)(b, opt, 10, .1)
    assert not changed(before, snapshot(b, opt))

@pytest.mark.parametrize('preset', ['RigL', 'SET'])
def test_attached(preset):
    method = DSTMethod(**{**PRESETS[preset], **EVERY})
    a,b = pair()
    for m in (a, b):
        opt = TORCH_OPTS['adamw'](m.parameters())
        attached = attach(method, m, opt, 60)
        for x,y in batches(60, dtype=torch.float64):
            backward(m, x, y)
            opt.step()
    assert_same(a, b)

@pytest.mark.parametrize('preset', ['RigL', 'SET', 'GMP', 'RigL_avg'])
@pytest.mark.parametrize('opt', ['fastai', 'torch'])
@without_default_device
def test_in_a_learner(preset, opt):
    from fastai.callback.core import Callback
    from fastai.callback.training import GradientClip
    from fastai.optimizer import Adam as FastaiAdam
    both = pair(DSTMethod(**{**SUPPORTED[preset], 'batches_per_update': 4}), make=lambda: net(torch.float32), sparsity=.8)
    for m in both:
        learn = learner(m, FastaiAdam if opt=='fastai' else wrapped(torch.optim.AdamW), DynamicSparseTrainingCallback(**{**SUPPORTED[preset], 'batches_per_update': 4}))
        learn.fit(4, .01)
    to_masked_layers(both[1])
    assert same_masks(masks(both[0]), masks(both[1])) and all(torch.allclose(p, q, atol=1e-4) for p,q in zip(both[0].parameters(), both[1].parameters()))

def test_grad_scaler():
    "The values' gradient is unscaled before the update, and the dense one follows"
    a,b = pair()
    method = DSTMethod(**{**RigL_presets, **EVERY})
    for m in (a, b):
        opt,scaler = TORCH_OPTS['momentum'](m.parameters()),torch.amp.GradScaler('cpu', init_scale=1024.)
        attached = attach(method, m, opt, 60)
        for x,y in batches(60, dtype=torch.float64):
            opt.zero_grad()
            scaler.scale(F.cross_entropy(m(x), y)).backward()
            scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
    assert_same(a, b)

def test_first_step_that_needs_what_nobody_kept():
    _,b = pair()
    opt,method = TORCH_OPTS['adam'](b.parameters()),DSTMethod(**{**RigL_presets, 'batches_per_update': 10})
    backward(b, *batches(1, dtype=torch.float64)[0])
    before = snapshot(b, opt)
    with pytest.raises(ValueError, match='method.enforce'): method.step(b, opt, 10, .1)
    assert not changed(before, snapshot(b, opt))

def test_resumed_from_state():
    "A state of a training goes on in a model of another mask, of another number of weights"
    method = DSTMethod(**{**SUPPORTED['GMP'], **EVERY})
    _,b = pair(method, .9)
    _,c = pair(method, .9, sparse_f=lambda ps, s: [.5 if p.numel()>1000 else s for p in ps])
    opts,data = [TORCH_OPTS['adamw'](m.parameters()) for m in (b, c)],batches(80, dtype=torch.float64)
    def train(m, o, steps):
        for step in steps: backward(m, *data[step-1]), method.step(m, o, step, (step-1)/80)
    train(b, opts[0], range(1, 41))
    c.load_state_dict(copy.deepcopy(b.state_dict()))
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for m,o in zip((b, c), opts): train(m, o, range(41, 81))
    assert not changed(snapshot(b, opts[0]), snapshot(c, opts[1]))

@pytest.mark.parametrize('n', [1, 2, 16, 17])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_inference_sees_every_change(n, dtype):
    "The matrix that is kept from call to call shares the values"
    sparse,x = twin_of(masked(nn.Linear(9, 13, dtype=dtype))),torch.randn(n, 9, dtype=dtype)
    def check():
        with torch.no_grad(): assert torch.allclose(sparse(x).double(), F.linear(x.double(), sparse.weight.double(), sparse.bias.double()), atol=1e-5 if dtype!=torch.bfloat16 else .1)
    check()
    sparse.values.data.mul_(2.); check()
    sparse.values.data = torch.randn_like(sparse.values); check()
    sparse.load_state_dict(twin_of(masked(nn.Linear(9, 13, dtype=dtype), .4)).state_dict()); check()
    copy.deepcopy(sparse).values.data.zero_(); check()
    sparse.values.data.copy_(torch.randn_like(sparse.values)); check()

@pytest.mark.parametrize('preset', ['RigL', 'GMP', 'RigL_avg'])
@without_default_device
def test_checkpoint(preset, tmp_path):
    "A training that is stopped goes on, whatever the number of active weights was"
    from fastai.optimizer import Adam as FastaiAdam
    from sparsefast.checkpoint import CheckpointCallback
    settings = {**SUPPORTED[preset], 'batches_per_update': 4}
    def fresh(where, stop=None):
        model = pair(DSTMethod(**settings), make=lambda: net(torch.float32), sparsity=.8)[1]
        cbs = [DynamicSparseTrainingCallback(**settings), CheckpointCallback()]
        if stop is not None:
            def cut(learn):
                if learn.epoch==stop: raise KeyError('cut')
            cbs.append(Watch('after_batch', cut))
        return learner(model, FastaiAdam, cbs, tmp=tmp_path/where)
    whole = fresh('whole')
    whole.fit(4, .01)
    with pytest.raises(KeyError, match='cut'): fresh('cut', 2).fit(4, .01)
    again = fresh('cut')
    again.fit(4, .01)
    assert not changed(snapshot(whole.model, whole.opt), snapshot(again.model, again.opt))

@pytest.mark.parametrize('n', [1, 2, 16, 17])
@pytest.mark.parametrize('bias', [True, False])
def test_the_short_way_is_left_where_more_is_to_be_done(n, bias):
    "Small batches go on from the last call, unless something has changed"
    layer = masked(nn.Linear(9, 13, bias=bias))
    sparse,x = twin_of(layer),torch.randn(n, 9)
    with torch.no_grad():
        first,again = sparse(x),sparse(x)                                    # the second takes the short way
        assert torch.allclose(first, layer(x), atol=1e-6) and torch.allclose(again, first, atol=1e-6) and again.shape==(n, 13)
        with pytest.raises(ValueError, match='9 features'): sparse(torch.randn(n, 8))
        assert sparse(x[:0]).shape==(0, 13) and torch.allclose(sparse(x[0]), first[0], atol=1e-6)
        with torch.autocast('cpu', torch.bfloat16): assert sparse(x.bfloat16()).dtype==torch.float32
        traced = torch.jit.trace(sparse, x)
        other = {k: v+1 for k,v in sparse.named_parameters()}
        there = torch.func.functional_call(sparse, other, (x,))
        sparse.values += 1
        assert torch.allclose(traced(x), sparse(x), atol=1e-5)
        assert torch.allclose(there, sparse(x) + (0 if not bias else 1), atol=1e-5)
        sparse.to(torch.float64)
        assert sparse(x.double()).dtype==torch.float64
    assert sparse(x.double()).requires_grad

NORMS = dict(lamb=lambda ps: fo.Lamb(list(ps), lr=.01, wd=.01), larc=lambda ps: fo.Larc(list(ps), lr=.01, mom=.9, wd=.01), clipped=TORCH_OPTS['adamw'])
@pytest.mark.parametrize('preset', ['RigL', 'SET', 'GraNet', 'GraNet_half', 'RigL_ITOP', 'RigL_avg', 'ACDC'])
@pytest.mark.parametrize('norm', NORMS)
def test_same_training_where_norms_count(norm, preset):
    "Of a layer, or of all gradients: at every step they are those of active weights, also where an update follows the step"
    settings = {**SUPPORTED[preset], **EVERY}
    if settings.get('grad_steps') is not None: settings['grad_steps'] = min(settings.get('grad_steps', 1), 3)
    method = DSTMethod(**settings)
    both = pair(method, .75)
    opts = [NORMS[norm](m.parameters()) for m in both]
    for m,o in zip(both, opts): method.check(m, o), method.enforce(m, o)
    for step,(x,y) in enumerate(batches(45, dtype=torch.float64), 1):
        for m,o in zip(both, opts):
            backward(m, x, y)
            if not method.before_step(m, o, step, total=50): continue
            if norm=='clipped': nn.utils.clip_grad_norm_(m.parameters(), .05)
            o.step(), method.after_step(m, o, step, total=50)
        assert_same(*both, opts)
    assert not any('_dst_' in n for n,_ in both[0].named_buffers())

# ------------------------------------------------------------ derivatives that compressed layers do not have
def forward_derivative(f, x):
    with forward_ad.dual_level(): return f(forward_ad.make_dual(x, torch.ones_like(x)))

DERIVATIVES = dict(penalty=('twice', lambda f, x: torch.autograd.grad(f(x.requires_grad_()).square().sum(), x, create_graph=True)), hessian=('twice', lambda f, x: torch.autograd.functional.hessian(lambda v: f(v).square().sum(), x)),
                   forward=('forward', forward_derivative), vmap=('torch.func', lambda f, x: torch.func.vmap(f)(x[:,None])), jacobian=('torch.func', lambda f, x: torch.func.jacrev(f)(x)),
                   grad=('torch.func', lambda f, x: torch.func.grad(lambda ps: torch.func.functional_call(f, ps, (x,)).sum())(dict(f.named_parameters()))))
@pytest.mark.parametrize('case', ['linear', 'single', 'conv three', 'conv pointwise'])
@pytest.mark.parametrize('which', DERIVATIVES)
def test_derivatives_that_are_refused(which, case):
    "By name, also where the matrix of the last call is there; masked layers have them"
    what,f = DERIVATIVES[which]
    layer,x = masked(LAYERS[case][0](None)),torch.randn(*LAYERS[case][1])
    sparse = twin_of(layer)
    f(layer, x.clone())
    for grad in ((True, False) if what=='torch.func' and which!='grad' else (True,)):
        with torch.no_grad(): sparse(x)
        with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=f'is compressed, and cannot .*{what}.*to_masked_layers'): f(sparse, x.clone())
    sparse(x).sum().backward()
    assert sparse.values.grad is not None
