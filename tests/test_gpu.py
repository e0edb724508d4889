"What only a GPU can show: the same masks as on a CPU, mixed precision with a scaler that works, no waiting, moves there and back"
import warnings
from copy import deepcopy
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.fp16 import MixedPrecision
from sparsefast import presets
from sparsefast.attach import attach
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.distributions import erdos_renyi_sparsity, first_layer_dense_uniform, uniform_sparsity
from sparsefast.see.doctor import sparse_doctor
from sparsefast.ship.files import load_sparse, save_sparse
from sparsefast.storage import to_sparse_layers
from sparsefast.masks import masked_params, sparse_params, top_k_mask, zero_masked_
from sparsefast.methods import DSTMethod
from sparsefast.patterns import block_pattern, fan_in_pattern, nm_pattern
from sparsefast.sparsify import sparsify_model, unsparsify_model
from helpers import *

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
CUDA,CATALOGUE = 'cuda',{k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}

@pytest.fixture(autouse=True)
def default_device(request):
    "Tests here say where things are, whatever `--device` says"
    torch.set_default_device(None)
    yield
    torch.set_default_device(request.config.getoption('--device'))

def same_on_cpu(a, b): return same_masks([m.cpu() for m in masks(a)], [m.cpu() for m in masks(b)])

# ------------------------------------------------------------ masks
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize('n', [50, 200_000])
@pytest.mark.parametrize('some', [False, True])
def test_top_k_is_that_of_the_cpu(dtype, n, some):
    "With ties, NaN and infinities, among all and among some"
    t = (torch.randn(n)*3).round().to(dtype)
    if t.is_floating_point(): t[::7],t[3::11],t[5::13] = float('nan'),float('inf'),-float('inf')
    among = torch.rand(n)<.6 if some else None
    n_among = n if among is None else int(among.sum())
    for k in (0, 1, n_among//10, n_among//2, n_among-1, n_among):
        assert torch.equal(top_k_mask(t, k, among), top_k_mask(t.to(CUDA), k, None if among is None else among.to(CUDA)).cpu())

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_are_zeros_whatever_was_there(dtype):
    t,mask = torch.randn(300, 40, device=CUDA).to(dtype),torch.rand(300, 40, device=CUDA)<.3
    t[::3],t[1::5] = float('nan'),-float('inf')
    want = torch.where(mask, t, 0)
    assert zero_masked_(t, mask) is t and torch.equal(t.nan_to_num(nan=1.5), want.nan_to_num(nan=1.5)) and not torch.signbit(t[~mask]).any()

@pytest.mark.parametrize('sparse_f', [uniform_sparsity, first_layer_dense_uniform, erdos_renyi_sparsity])
@pytest.mark.parametrize('pattern_f', [None, fan_in_pattern, nm_pattern, partial(block_pattern, size=(2, 2))])
def test_a_seed_gives_the_same_masks_everywhere(sparse_f, pattern_f):
    models = []
    for device in ('cpu', CUDA):
        torch.manual_seed(0)
        models.append(mlp(16, 32, 24, 8).to(device))
        torch.manual_seed(3)
        sparsify_model(models[-1], .5, sparse_f=uniform_sparsity if pattern_f is nm_pattern else sparse_f, **(dict(pattern_f=pattern_f) if pattern_f else {}))
    assert same_on_cpu(*models) and all(m.is_cuda for m in masks(models[1])) and masked_are_zero(models[1])

# ------------------------------------------------------------ training
def net(): return mlp(8, 32, 24, 4, dtype=torch.float64)

def both(preset, sparsity=.5):
    "A model on the CPU and its twin on the GPU, and the method to train them by"
    settings = dict(CATALOGUE[preset])
    if preset!='Static': settings |= dict(batches_per_update=5, stop_pct=.9)
    if settings.get('grad_steps') is not None: settings['grad_steps'] = min(settings.get('grad_steps', 1), 3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        method = DSTMethod(**settings)
    torch.manual_seed(0)
    a = net()
    sparsify_model(a, sparsity, **method.start(sparsity), **(dict(sparse_f=uniform_sparsity) if method.pattern_f is nm_pattern else {}))
    return a, deepcopy(a).to(CUDA), method

@pytest.mark.parametrize('preset', CATALOGUE)
@pytest.mark.parametrize('opt', ['momentum', 'adamw'])
@pytest.mark.filterwarnings('ignore')
def test_the_same_training_as_on_the_cpu(preset, opt, total=60):
    "Float64: the same masks, and weights to rounding, by every method"
    a,b,method = both(preset)
    for model in (a, b):
        o = TORCH_OPTS[opt](model.parameters())
        device = next(model.parameters()).device
        for step,(x,y) in enumerate(batches(total, n_out=4, dtype=torch.float64), 1):
            backward(model, x.to(device), y.to(device))
            method.step(model, o, step, (step-1)/total)
            assert masked_are_zero(model)
    assert same_on_cpu(a, b) and all(torch.allclose(p, q.cpu(), rtol=1e-9, atol=1e-9) for p,q in zip(a.parameters(), b.parameters()))

@pytest.mark.parametrize('preset', ['RigL', 'SET', 'SNFS', 'GraNet', 'SRigL'])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.filterwarnings('ignore')
def test_weights_are_zero_after_every_step_and_forward(preset, fused, total=40):
    "Whatever the optimizer does, and when somebody writes to the weights in between"
    _,b,method = both(preset)
    b = b.float()
    opt = torch.optim.AdamW(b.parameters(), lr=.01, weight_decay=.1, fused=fused, foreach=not fused)
    for step,(x,y) in enumerate(batches(total, n_out=4), 1):
        backward(b, x.to(CUDA), y.to(CUDA))
        method.step(b, opt, step, (step-1)/total)
        assert masked_are_zero(b)
        if step%7==0:
            with torch.no_grad():
                for p,*_ in sparse_params(b): p.add_(1.)                                  # a write that torch counts; no guard sees another one here
            b(x.to(CUDA))
            assert masked_are_zero(b)
    b.eval()
    with torch.no_grad():
        for p,*_ in sparse_params(b): p.data += 1.
        b.load_state_dict({k: v.clone() for k,v in b.state_dict().items()})
        b(x.to(CUDA))
    assert masked_are_zero(b)

# ------------------------------------------------------------ mixed precision
def cuda_learner(preset='RigL', **kw):
    settings = {**CATALOGUE[preset], 'batches_per_update': 4, 'stop_pct': 1.}
    cb,model = DynamicSparseTrainingCallback(**settings),sparse_mlp()
    learn = learner(model, cbs=cb, **kw)
    learn.dls.to(CUDA)
    return learn,cb

class Scales(nn.Module):
    "A loss that some batches make too large for half precision"
    def __init__(self, at): super().__init__(); self.at,self.n = at,0
    def forward(self, out, y):
        self.n += 1
        return F.cross_entropy(out, y)*(1e30 if self.n in self.at else 1.)

@pytest.mark.parametrize('preset', ['RigL', 'SET', 'SNFS', 'GraNet', 'RigL_avg'])
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
@pytest.mark.filterwarnings('ignore')
def test_mixed_precision_in_a_learner(preset, half):
    "Masks move, counts and zeros hold, and the model learns"
    learn,cb = cuda_learner(preset)
    getattr(learn, half)()
    before,moved,zeros = masks(learn.model),[],[]
    learn.add_cb(Watch('after_batch', lambda l: (zeros.append(masked_are_zero(l.model)), moved.append(masks(l.model)))))
    with learn.no_bar(): learn.fit(3)
    assert all(zeros) and len(zeros)>=30 and next(learn.model.parameters()).is_cuda
    assert not same_masks([m.cpu() for m in before], [m.cpu() for m in moved[-1]])
    if preset in ('RigL', 'SET'): assert nnz(learn.model)==[int(m.sum()) for m in before]

def test_growth_sees_gradients_without_their_scale():
    "The callback comes after the scaler has divided, and before clipping"
    seen = {}
    for half in (False, True):
        learn,cb = cuda_learner()
        if half: learn.to_fp16()
        got = seen[half] = []
        learn.add_cb(Watch('before_step', lambda l: got.append([p.grad.clone() for p in l.model.parameters()]), order=MixedPrecision.order+.4))
        with learn.no_bar(): learn.fit(1)
    for a,b in zip(seen[False][0], seen[True][0]): torch.testing.assert_close(a, b, rtol=.05, atol=5e-3)

def test_overflow_changes_nothing_and_the_scale_falls():
    "An infinite gradient at an update: neither masks nor weights nor optimizer move, and training goes on"
    learn,cb = cuda_learner()
    learn.to_fp16()
    learn.loss_func = Scales({4})                                                     # where the first update would be
    states = []
    learn.add_cb(Watch('before_batch', lambda l: states.append((snapshot(l.model), l.mixed_precision.scaler.get_scale()))))
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2)
    assert not changed(states[3][0], states[4][0]) and changed(states[4][0], states[5][0])
    assert masked_are_zero(learn.model) and all(p.isfinite().all() for p in learn.model.parameters())

def test_a_scaler_in_a_loop_of_ones_own():
    "As the page on plain PyTorch has it: unscale, then the method's step under the scaler's check"
    model = sparse_mlp().to(CUDA)
    opt,scaler,method = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9),torch.amp.GradScaler('cuda'),DSTMethod(**{**CATALOGUE['RigL'], 'batches_per_update': 5})
    attach(method, model, opt, 40)
    first = masks(model)
    for step,(x,y) in enumerate(batches(40), 1):
        opt.zero_grad()
        with torch.autocast('cuda', torch.float16): loss = F.cross_entropy(model(x.to(CUDA)), y.to(CUDA))
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert masked_are_zero(model)
    assert not same_masks(first, masks(model)) and nnz(model)==[int(m.sum()) for m in first]

# ------------------------------------------------------------ waiting
def waits(f):
    "How often `f` makes the processor wait for the GPU"
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try: f()
        finally: torch.cuda.set_sync_debug_mode('default')
    return [str(w.message) for w in seen if 'called a synchronizing' in str(w.message)]        # not the notice that this mode is a prototype

def deep(n, dtype=None): return mlp(*[16]*(n+1), dtype=dtype)

WAITS_BY_LAYER = {'SET_original', 'SR_STE', 'SRigL', 'TopKAST', 'GSE'}   # these look at numbers of each layer: ranks by sign, groups that are full, neurons that go, weights that explore, draws
@pytest.mark.parametrize('preset', [k for k in CATALOGUE if k not in WAITS_BY_LAYER])
@pytest.mark.filterwarnings('ignore')
def test_waiting_does_not_grow_with_the_number_of_layers(preset):
    got = {}
    for n in (3, 12):
        method = DSTMethod(**{**CATALOGUE[preset], **({} if preset=='Static' else dict(batches_per_update=2, stop_pct=.9)), **(dict(grad_steps=2) if CATALOGUE[preset].get('grad_steps', 1)!=1 else {})})
        torch.manual_seed(0)
        model = deep(n).to(CUDA)
        sparsify_model(model, .5, **method.start(.5))
        opt,x = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9),torch.randn(8, 16, device=CUDA)
        for step in range(1, 9):
            opt.zero_grad()
            model(x).square().mean().backward()
            w = waits(partial(method.step, model, opt, step, (step-1)/20))
            if step>=5: got.setdefault('update' if method.batches_per_update==2 and step%2==0 else 'step', {}).setdefault(n, []).append(len(w))
    for kind,by in got.items(): assert by[3]==by[12], (kind, by)
    assert not any(got['step'][12]) and ('update' not in got or max(got['update'][12])<=6), got

@pytest.mark.parametrize('train', [True, False])
def test_forward_passes_do_not_wait(train):
    model,x = sparse_mlp().to(CUDA).train(train),torch.randn(8, 8, device=CUDA)
    for _ in range(3): model(x)
    assert not waits(partial(model, x))

# ------------------------------------------------------------ there and back
def test_moves_between_devices():
    model = sparse_mlp()
    model.to(CUDA)
    assert all(m.is_cuda for m in masks(model)) and sparse_doctor(model).healthy
    for p,*_ in sparse_params(model): p.data.add_(1.)                                 # written to on the GPU, and seen first on the CPU
    model.cpu().eval()
    x = torch.randn(4, 8)
    with torch.no_grad(): y = model(x)
    twin = unsparsify_model(deepcopy(model))
    assert masked_are_zero(model) and torch.equal(y, twin(x))

@pytest.mark.parametrize('sparse', [False, True])
@pytest.mark.parametrize('to', ['cpu', CUDA])
def test_files_there_and_back(sparse, to, tmp_path):
    model = sparse_mlp(.9, (8, 64, 64, 3)).to(CUDA)
    opt = torch.optim.AdamW(model.parameters())
    if sparse: to_sparse_layers(model, opt, least=.5)
    x,y = batches(1)[0]
    backward(model, x.to(CUDA), y.to(CUDA))
    opt.step()
    save_sparse(model, tmp_path/'a.safetensors', opt)
    other = sparse_mlp(.9, (8, 64, 64, 3), seed=5).to(to)
    its = torch.optim.AdamW(other.parameters())
    load_sparse(tmp_path/'a.safetensors', other, its)
    assert all(p.device.type==to for p in other.parameters()) and masked_are_zero(other)
    with torch.no_grad(): torch.testing.assert_close(other(x.to(to)).cpu(), model(x.to(CUDA)).cpu(), rtol=1e-4, atol=1e-5)
    backward(other, x.to(to), y.to(to))
    its.step()
    assert all(v.device.type==to for p in other.parameters() for v in opt_tensors(its, p).values())

@pytest.mark.parametrize('mode', [None, 'reduce-overhead'])
@pytest.mark.filterwarnings('ignore')
def test_compiled(mode):
    "A compiled model masks its weights and sees masks that have moved, CUDA graphs included"
    model = sparse_mlp(.6, (8, 24, 20, 3)).to(CUDA)
    plain = deepcopy(model)
    fast,method = torch.compile(model, **(dict(mode=mode) if mode else {})),DSTMethod(**{**CATALOGUE['RigL'], 'batches_per_update': 5})
    for m,f in ((model, fast), (plain, plain)):
        opt = torch.optim.SGD(m.parameters(), lr=.05, momentum=.9)
        for step,(x,y) in enumerate(batches(20), 1):
            opt.zero_grad()
            F.cross_entropy(f(x.to(CUDA)), y.to(CUDA)).backward()
            method.step(m, opt, step, (step-1)/20)
            assert masked_are_zero(m)
    assert same_masks(masks(model), masks(plain)) and all(torch.allclose(p, q, atol=1e-4) for p,q in zip(model.parameters(), plain.parameters()))
