"Masking, guards, and selection in large layers: what is exact, and what a guard sees"
import copy, io, math, pickle
from functools import partial
import numpy as np, pytest, torch, torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.optimizer import Adam as fastAdam, SGD as fastSGD
from helpers import PRESETS, backward, batches, learner, masked_are_zero, opt_tensors, plain_loop, snapshot, sparse_mlp
from sparsefast import masks as M, ops, topk
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.guard import MaskGuard, enforce_masks, guards
from sparsefast.masks import masked_params, sparse_params, zero_masked_, zero_masked_all_
from sparsefast.methods import DSTMethod
from sparsefast.presets import ACDC_presets, GMP_presets, RigL_presets, Static_presets
from sparsefast.patterns import nm_pattern
from sparsefast.scores import weight_magnitude
from sparsefast.sparsify import add_mask, sparse_kaiming_normal_, sparsify_model
from sparsefast.topk import top_k_mask

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
METHOD = partial(DSTMethod, **{**RigL_presets, 'batches_per_update': 8})
STILL = partial(DSTMethod, **{**Static_presets, 'batches_per_update': 1000})
def engine_step(model, opt, step=1, method=None, total=10_000):
    (x,y), = batches(1, seed=step)
    backward(model.train(), x, y)
    (method or STILL()).step(model, opt, step, (step-1)/total)

def dirty(model): return [n for m,n,p,mask in masked_params(model) if (p[~mask]!=0).any()]

# ------------------------------------------------------------ masking in pieces
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'mixed', 'transposed'])
@pytest.mark.parametrize('how', ['one', 'all', 'fused', 'plain'])
def test_every_way_of_masking_is_masking(dtype, layout, how, monkeypatch):
    "`fused` is what an accelerator does, and works on a CPU too; `plain` is what is done without a compiled kernel"
    if how=='plain': monkeypatch.setattr(ops, '_kernels', None)
    t = (torch.randn(5,4,3,3)*10).to(dtype)
    if dtype.is_floating_point: t.view(-1)[::7],t.view(-1)[1::7],t.view(-1)[2::7] = math.nan,-math.inf,-0.
    mask = torch.rand(5,4,3,3)<.5
    if layout!='contiguous': t = t.to(memory_format=torch.channels_last) if layout!='transposed' else t.transpose(0,1).contiguous().transpose(0,1)
    if layout=='channels_last': mask = mask.to(memory_format=torch.channels_last)
    want = torch.where(mask, t, torch.zeros((), dtype=dtype))
    out = t
    if how=='all': zero_masked_all_([t], [mask])
    elif how=='fused': M._fused([t, other := torch.ones(7)], [mask, torch.arange(7)<3])
    else:
        version = t._version
        out = zero_masked_(t, mask)
        assert t._version>version                                            # autograd counts the write
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    assert how!='fused' or other.tolist()==[1.]*3+[0.]*4
    assert out is t and torch.equal(t.contiguous().view(bits), want.contiguous().view(bits))          # bit for bit: NaN and -0.0 stay or are +0.0

def test_weights_are_masked_without_memory():
    "`torch.func` hands out tensors that a kernel cannot see"
    t,mask = torch.randn(3, 64), torch.rand(64)<.5
    want = torch.where(mask, t, 0.)
    assert torch.equal(torch.func.vmap(lambda r: zero_masked_(r.clone(), mask))(t), want)
    assert torch.equal(torch.func.grad(lambda r: (zero_masked_(r.detach().clone(), mask)*r).sum())(t[0]), want[0])

compiled = pytest.mark.skipif(ops._kernels is None, reason='no compiled kernels')

@compiled
@pytest.mark.parametrize('n', [0, 1, 7, 31, 64, 1000])
@pytest.mark.parametrize('size', [1, 2, 4, 8])
def test_the_kernel_writes_where_it_is_told_and_nowhere_else(n, size):
    "At any address, aligned or not"
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    for offset in (0, 1, 3):
        t,mask = torch.randint(1, 100, (n+8,)).to(bits),torch.rand(n)<.3
        want = t.clone()
        want[offset:offset+n] *= mask
        ops._kernels.zero_masked(t[offset:].data_ptr(), mask.data_ptr(), n, size)
        assert torch.equal(t, want)

@compiled
@pytest.mark.parametrize('n,size', [(-1, 4), (1, 3), (1, 0)])
def test_the_kernel_refuses_other_sizes(n, size):
    t = torch.ones(4)
    with pytest.raises(ValueError, match='size must be 1, 2, 4 or 8'): ops._kernels.zero_masked(t.data_ptr(), t.data_ptr(), n, size)

@pytest.mark.parametrize('layout', [lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t.to(memory_format=torch.channels_last)], ids=['contiguous', 'turned', 'channels last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.complex128], ids=str)
def test_a_look_at_a_few_positions_sees_each_of_them_and_no_other(dtype, layout):
    "With the kernel and without; positions are those of the tensor, however it lies in memory"
    from sparsefast.guard import _nonzero_at
    t,at = layout(torch.zeros(5, 4, 3, 3, dtype=dtype)),torch.tensor([0, 7, 64, 179])
    def seen(i):
        t.zero_()
        t[tuple(torch.unravel_index(torch.tensor(i), t.shape))] = 1
        return _nonzero_at(t, at)
    assert [i for i in range(180) if seen(i)]==at.tolist()
    assert not _nonzero_at(t, at[:0]) and _nonzero_at(torch.full_like(t, math.nan if dtype!=torch.int8 else 1), at[:1])

@compiled
def test_the_kernel_looks_at_nothing_outside():
    "A position outside, or a tensor without memory, counts as not zero, so that the weights are masked or refused"
    look,t,at = ops._kernels.nonzero_at,torch.zeros(4),torch.tensor([3, 4, -1, 2**62])
    assert [look(t.data_ptr(), 4, 4, at[i:].data_ptr(), 1) for i in range(4)]==[False, True, True, True]
    assert look(0, 4, 4, at.data_ptr(), 1) and not look(0, 0, 4, 0, 0)
    for size in (0, 17, -4):
        with pytest.raises(ValueError, match='size must be 1 to 16'): look(t.data_ptr(), 4, size, at.data_ptr(), 1)

@pytest.mark.parametrize('density', [0, .01, .5, 1])
@pytest.mark.parametrize('n', [0, 1, 63, 1000])
def test_positions_of_ones(n, density):
    "With the kernel and without, of a mask with gaps in memory too; the kernel writes as many as there is room for"
    mask = torch.rand(n, 2)<density
    for m in (mask, mask[:,0], mask.t()):
        found = M.nonzero_flat(m)
        assert found.dtype==torch.int64 and found.tolist()==[i for i,b in enumerate(m.reshape(-1).tolist()) if b]
    if ops._kernels is None: return
    found,room = torch.full((n+2,), -1),min(3, int(mask.sum()))
    assert ops._kernels.positions(mask.data_ptr(), mask.numel(), found.data_ptr(), room)==room and (found[room:]==-1).all()

@compiled
def test_the_kernel_is_not_given_what_it_cannot_read(monkeypatch):
    "Other shapes, devices and masks that are not boolean, and tensors without memory"
    from torch._subclasses.fake_tensor import FakeTensorMode
    t,mask = torch.ones(4, 6),torch.rand(4, 6)<.5
    with FakeTensorMode() as mode: fake,fake_mask = mode.from_tensor(t),mode.from_tensor(mask)
    for a,m in ((t, mask[0]), (t, mask.float()), (t.t(), mask), (t[:,::2], mask[:,::2]), (t, mask.to('meta')), (t.to('meta'), mask), (fake, fake_mask)):
        assert not M._by_kernel(M.compiled(), a, m)
    assert M._by_kernel(M.compiled(), t, mask) and torch.equal(t, mask.float())

# ------------------------------------------------------------ selection by a sampled cut
N = (1<<16)+77
KINDS = dict(normal=lambda g: torch.randn(N, generator=g), zero=lambda g: torch.zeros(N), constant=lambda g: torch.full((N,), 2.5), rising=lambda g: torch.arange(N).float(),
             falling=lambda g: -torch.arange(N).float(), tied=lambda g: torch.randint(4, (N,), generator=g).float(), mostly_zero=lambda g: torch.randn(N, generator=g).clamp(min=1.5)-1.5,
             spikes=lambda g: torch.where(torch.arange(N)%5==0, torch.randn(N, generator=g), 0.), infinite=lambda g: torch.randn(N, generator=g).exp()**100,
             nan=lambda g: torch.where(torch.rand(N, generator=g)<.9, math.nan, torch.randn(N, generator=g)), all_nan=lambda g: torch.full((N,), math.nan),
             low=lambda g: torch.full((N,), -math.inf), half=lambda g: torch.randn(N, generator=g).half(), whole=lambda g: torch.randint(-9, 9, (N,), generator=g),
             signed_zero=lambda g: torch.where(torch.rand(N, generator=g)<.5, 0., -0.), one_column=lambda g: (torch.arange(N)%4==0).float())

def by_sort(t, k, among=None):
    "Stable sorts in numpy: by candidate, NaN, value, index"
    v = t.double().numpy()
    cand = np.ones(len(v), bool) if among is None else among.numpy()
    order = np.lexsort((np.arange(len(v)), -np.nan_to_num(v, nan=0., posinf=math.inf, neginf=-math.inf), np.isnan(v), ~cand))
    mask = torch.zeros(len(v), dtype=torch.bool)
    mask[torch.from_numpy(order[:k].copy())] = True
    return mask

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('share', [0., .03, .4])
@pytest.mark.parametrize('density', [None, .1, .9])
def test_selection_of_large_layers_is_exact(kind, share, density):
    g = torch.Generator().manual_seed(5)
    t,among = KINDS[kind](g), None if density is None else torch.rand(N, generator=g)<density
    k = int(share*(N if among is None else int(among.sum())))
    want = by_sort(t, k, among)
    assert torch.equal(top_k_mask(t, k, among=among), want)
    assert torch.equal(topk._sorted(t, k, among), want)                                       # what a GPU does

def test_the_sample_is_used_and_may_mislead(monkeypatch):
    t = torch.randn(N)
    used = []
    real = topk._sampled
    monkeypatch.setattr(topk, '_sampled', lambda *a: used.append(r := real(*a)) or r)
    assert torch.equal(top_k_mask(t, 500), by_sort(t, 500)) and used.pop() is not None
    t[::len(t)//(1<<14)|1] = 99.                                                             # all that the sample sees is high
    assert torch.equal(top_k_mask(t, N//3), by_sort(t, N//3)) and used.pop() is None

@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_first_ones(bits, data):
    b = torch.tensor(bits)
    n = data.draw(st.integers(0, int(b.sum())))
    want = b.clone(); want[b.nonzero().flatten()[n:]] = False
    assert torch.equal(topk._first(b.clone(), n), want)

def test_first_ones_of_many():
    b = torch.rand(50_000)<.3
    for n in (0, 1, 7000, int(b.sum())):
        want = b.clone(); want[b.nonzero().flatten()[n:]] = False
        assert torch.equal(topk._first(b.clone(), n), want)

def test_a_known_number_of_candidates_is_not_counted():
    t,among = torch.arange(6.), torch.tensor([1,1,1,0,0,0]).bool()
    assert torch.equal(top_k_mask(t, 2, among=among, n_among=3), top_k_mask(t, 2, among=among))
    with pytest.raises(ValueError, match='number of candidates, 3, got 4'): top_k_mask(t, 4, among=among, n_among=3)

# ------------------------------------------------------------ what a guard sees
def fill(p): p.data.fill_(1.)
def versioned(p):
    with torch.no_grad(): p.add_(1.)
def view(p):
    with torch.no_grad(): p.view(-1)[:] = 1.
def other(p): p.data = torch.ones_like(p)
def by_numpy(p): p.detach().numpy()[:] = 1.

def loaded(m, assign=False): m.load_state_dict({k: torch.ones_like(v) if k.endswith('weight') else v for k,v in m.state_dict().items()}, assign=assign)
def half_float(m):
    for p in m.parameters(): p.data.add_(1.)
    m.half().float()
def opt_writes(make):
    def write(m):
        for p in m.parameters(): p.grad = torch.ones_like(p)
        opt = make(list(m.parameters()))
        opt.step()
        for p in m.parameters(): p.grad = None
    return write
each = lambda f: lambda m: [f(p) for *_,p,_ in list(masked_params(m))]
WRITES = dict(data_add=each(lambda p: p.data.add_(1.)), fill=each(fill), versioned=each(versioned), view=each(view), other_data=each(other), numpy=each(by_numpy), load=loaded, assign=partial(loaded, assign=True),
              half_float=half_float, init=each(lambda p: nn.init.ones_(p)), sgd=opt_writes(partial(torch.optim.SGD, lr=.1)), foreach=opt_writes(partial(torch.optim.Adam, lr=.1, foreach=True)),
              fused=opt_writes(partial(torch.optim.Adam, lr=.1, fused=True)), fused_sgd=opt_writes(partial(torch.optim.SGD, lr=.1, fused=True)), fast_sgd=opt_writes(partial(fastSGD, lr=.1)), fast_adam=opt_writes(partial(fastAdam, lr=.1)))
SILENT = {'data_add', 'fill', 'numpy'}

@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('before', ['nothing', 'forward', 'evaluation', 'engine', 'engine and evaluation'])
def test_a_training_model_is_masked_in_its_next_forward(write, before):
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    if 'forward' in before: model(X)
    if 'engine' in before:
        for s in (1,2,3): engine_step(model, opt, s)
    if 'evaluation' in before:
        with torch.no_grad(): model.eval()(X); model(X)
    model.train()
    WRITES[write](model)
    assert dirty(model)
    model(X)
    assert not dirty(model)

@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('trained', ['plain', 'engine', 'in evaluation mode'])
def test_an_evaluation_after_training_loading_or_moving_is_masked(write, trained):
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    with torch.no_grad(): model.eval()(X); model(X)
    if trained=='engine': engine_step(model, opt)
    else: model.train(trained=='plain')(X).sum().backward()
    WRITES[write](model)
    assert dirty(model)
    with torch.no_grad(): model.eval()(X)
    assert not dirty(model)

@pytest.mark.parametrize('write', sorted(WRITES.keys()-SILENT-{'fused', 'fused_sgd', 'fast_sgd', 'fast_adam'}))
def test_between_two_evaluations_all_but_silent_writes_are_seen(write):
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X); model(X)
        WRITES[write](model)
        assert dirty(model)
        model(X)
    assert not dirty(model)

@pytest.mark.parametrize('make', [partial(torch.optim.Adam, lr=.1, fused=True), partial(fastAdam, lr=.1)], ids=['fused', 'fastai'])
def test_training_in_evaluation_mode(make):
    "As with frozen batch norms: gradients are recorded, so the hooks know that weights may move"
    model = sparse_mlp().eval()
    opt = make(list(model.parameters()))
    for step in range(3):
        with torch.no_grad(): model(X)
        backward(model, *batches(1)[0])
        with torch.no_grad(): model(X)                                                       # a gradient is there: nothing may be noted
        opt.step()
        with torch.no_grad(): model(X)
        assert not dirty(model)

def count_masking(monkeypatch):
    "How many parameters guards mask"
    n,mask = [],MaskGuard._mask
    monkeypatch.setattr(MaskGuard, '_mask', lambda self: n.extend(self._pairs()) or mask(self))
    return n

def test_guards_do_nothing_where_nothing_happened(monkeypatch):
    model,n = sparse_mlp(),count_masking(monkeypatch)
    with torch.no_grad():
        for _ in range(3): model.eval()(X)
    assert len(n)==3                                                                         # three layers, by the model's guard, the first time only
    model.train()(X); model(X)
    assert len(n)==9                                                                         # training: always
    opt = torch.optim.Adam(model.parameters(), fused=True)
    for s in range(1, 4):
        engine_step(model, opt, s)
        n.clear()
        model(X)
        assert not n                                                                         # but not just after the engine's step
        model(X)
        assert len(n)==3                                                                     # and only once

@pytest.mark.parametrize('copy_f', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_a_copy_knows_nothing(copy_f):
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X)
        twin = copy_f(model)
        each(fill)(twin)
        twin(X)
        assert not dirty(twin) and not dirty(model)
        assert [bool(g.key) for *_,g in guards(model)]==[True]+[False]*3 and not any(g.key for *_,g in guards(copy_f(model)))
        each(fill)(twin.train()); twin(X)
    assert not dirty(twin)

def test_state_dicts_and_files_hold_nothing_new():
    model = sparse_mlp()
    keys = list(model.state_dict())
    engine_step(model, torch.optim.SGD(model.parameters(), lr=.1))
    with torch.no_grad(): model.eval()(X)
    assert list(model.state_dict())==keys
    torch.save(model.state_dict(), f := io.BytesIO())
    f.seek(0)
    assert list(torch.load(f, weights_only=True))==keys

@pytest.mark.parametrize('edit', ['in place', 'other buffer', 'other data', 'loaded'])
def test_an_edited_mask_counts(edit):
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X)
        new = ~model[0].weight_mask
        model[0].weight.data.masked_fill_(new, 1.)                                           # what the new mask leaves active
        if edit=='in place': model[0].weight_mask.copy_(new)
        if edit=='other buffer': model[0].weight_mask = new
        if edit=='other data': model[0].weight_mask.data = new
        if edit=='loaded': model.load_state_dict({**model.state_dict(), '0.weight_mask': new})
        model(X)
    assert (model[0].weight[~new]==0).all()

def test_memory_that_is_used_again_is_masked():
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X)
        for _ in range(20):
            each(other)(model)
            each(other)(model)                                                               # the allocator may give the first memory back
            model(X)
            assert not dirty(model)

def test_memory_turned_round_is_masked():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify_model(model.eval(), .5)
    with torch.no_grad():
        model(X)
        model[0].weight.data = model[0].weight.data.t()
        model(X)
    assert not dirty(model)

def test_two_parameters_over_the_same_memory():
    "Each has a version of its own: a write to one is seen by its own guard, though both have been evaluated and nobody looks at this weight"
    a,b = nn.Linear(64,64), nn.Linear(64,64)
    b.weight = nn.Parameter(a.weight.data)
    for m in (a,b): add_mask(m, 'weight', torch.eye(64).bool()); enforce_masks(m); m.eval()
    x = torch.randn(2,64)
    for m in (a,b):
        with torch.no_grad():
            a(x); b(x)
            m.weight[40,41] = 1.                                   # one of 4032 masked weights: no sample has it
            assert a.weight[40,41]==1
            m(x)
        assert not dirty(a) and not dirty(b)

def test_inference_mode_and_parameters_made_in_it():
    model = sparse_mlp().eval()
    with torch.inference_mode():
        model(X); model(X)
        each(other)(model); model(X)
        assert not dirty(model)
        inside = sparse_mlp().eval()
        each(fill)(inside); inside(X); each(fill)(inside); inside(X)
        assert not dirty(inside)

def test_functional_call_still_masks():
    model = sparse_mlp()
    params = {k: torch.ones_like(v) for k,v in model.named_parameters()}
    out = torch.func.functional_call(model, params, (X,))
    want = sparse_mlp(); want.load_state_dict({**want.state_dict(), **params})
    assert torch.allclose(out, want(X))
    grads = torch.func.grad(lambda ps: torch.func.functional_call(model, ps, (X,)).sum())({k: torch.ones_like(v) for k,v in model.named_parameters()})
    assert set(grads)==set(params)

def test_tied_and_shared_layers_stay_masked():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 3))
    sparsify_model(model, .6)
    opt = torch.optim.Adam(model.parameters(), lr=.01, fused=True)
    for s in range(1, 70):
        engine_step(model, opt, s, METHOD(), 100)
        assert masked_are_zero(model)
        assert all((t[~mask]==0).all() for *_,p,mask in masked_params(model) for t in opt_tensors(opt, p).values())

# ------------------------------------------------------------ the step
def test_a_gradient_that_becomes_nan_after_it_was_masked():
    "Clipping multiplies by NaN what was zero"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for s in range(1, 6):
        (x,y), = batches(1, seed=s)
        backward(model, x, y)
        if s==5: model[4].weight.grad.view(-1)[int(model[4].weight_mask.flatten().nonzero()[0])] = math.nan
        if STILL().before_step(model, opt, s, 0.):
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step()
            STILL().after_step(model, opt, s, 0.)
        assert masked_are_zero(model)
    assert model[0].weight.isnan().any()

@pytest.mark.parametrize('how', ['versioned', 'silent', 'other tensor', 'closure'])
def test_a_gradient_that_is_dense_again_when_the_optimizer_steps(how):
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for s in range(1, 6):
        (x,y), = batches(1, seed=s)
        backward(model, x, y)
        assert STILL().before_step(model, opt, s, 0.)
        for *_,p,_ in masked_params(model):
            if how=='versioned': p.grad.add_(1.)
            if how=='silent': p.grad.data.add_(1.)
            if how=='other tensor': p.grad = torch.ones_like(p)
        opt.step((lambda: (backward(model, x, y), torch.tensor(0.))[1]) if how=='closure' else None)
        STILL().after_step(model, opt, s, 0.)
        assert masked_are_zero(model)

@pytest.mark.parametrize('part', ['all', 'some'])
def test_dense_state_loaded_in_the_middle(part):
    "Masked weights stay zero whatever the state says; `enforce` resets it"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    for s in range(1, 5): engine_step(model, opt, s)
    state = copy.deepcopy(opt.state_dict())
    for v in state['state'].values():
        if part=='all': v['momentum_buffer'].fill_(1.)
        else: v['momentum_buffer'].view(-1)[:2] = 1.
    opt.load_state_dict(state)
    for s in range(5, 45):
        engine_step(model, opt, s)
        assert masked_are_zero(model)
    STILL().enforce(model, opt)
    assert all((t[~mask]==0).all() for *_,p,mask in masked_params(model) for t in opt_tensors(opt, p).values())

def test_a_mask_edited_in_the_middle():
    "State of what was active before is zeroed too, so that it does not move a weight that is gone"
    model = sparse_mlp()
    opt = torch.optim.Adam(model.parameters(), lr=.01, fused=True)
    for s in range(1, 5): engine_step(model, opt, s)
    model[0].weight_mask.view(-1)[int(model[0].weight_mask.flatten().nonzero()[0])] = False
    for s in range(5, 12):
        engine_step(model, opt, s)
        assert masked_are_zero(model)

@pytest.mark.parametrize('write', [each(lambda p: p.data.add_(1.)), each(versioned), each(other)], ids=['silent', 'versioned', 'other data'])
def test_weights_written_between_forward_and_step(write):
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for s in range(1, 5): engine_step(model, opt, s)
    backward(model, *batches(1)[0])
    write(model)
    STILL().step(model, opt, 5, 0.)
    assert masked_are_zero(model)

def test_a_single_silent_write_does_not_stay():
    "Neither a guard's sample nor torch's count show it; the engine's next step undoes it"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300))
    sparsify_model(model, .9)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    def step(s):
        model.zero_grad()
        model(torch.ones(2, 300)).sum().backward()
        STILL().step(model, opt, s, 0.)
    for s in range(1, 4): step(s)
    guard = next(g for m,_,g in guards(model) if m is model)
    model(torch.ones(2, 300))
    looked = set(guard.samples[0].tolist())
    i = next(i for i in (~model[0].weight_mask).flatten().nonzero().flatten().tolist() if i not in looked)
    step(4)
    model[0].weight.data.view(-1)[i] = 1.
    model(torch.ones(2, 300))
    assert not masked_are_zero(model)                                                        # this is what a guard cannot see
    step(5)
    assert masked_are_zero(model)

def test_foreign_steps_between_the_engines():
    "Fused optimizers are not counted by torch, and leave dense state behind"
    model = sparse_mlp()
    opt = torch.optim.Adam(model.parameters(), lr=.01, fused=True)
    for s in range(1, 80):
        if s%5: engine_step(model, opt, s)
        else:
            backward(model, *batches(1, seed=s)[0])
            opt.step()
            backward(model, *batches(1, seed=s)[0])
            assert masked_are_zero(model)
            opt.step()
        if s%5: assert masked_are_zero(model)

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('mode', ['engine', 'callback'])
def test_channels_last(preset, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2,2,2)), nn.Conv2d(2, 8, 2), nn.Flatten(), nn.Linear(8, 3))
    sparsify_model(model, .5)
    model = model.to(memory_format=torch.channels_last)
    if mode=='engine': plain_loop(model, torch.optim.SGD(model.parameters(), lr=.1, momentum=.9), DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8}), 50, lambda s: None)
    else: learner(model).fit(3, cbs=DynamicSparseTrainingCallback(**{**PRESETS[preset], 'batches_per_update': 8}))
    assert masked_are_zero(model)

def test_a_reset_of_ones_own_is_not_trusted():
    "State may be dense then, and moves masked weights: they are masked after each step"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    plain_loop(model, opt, METHOD(reset_state_f=lambda p, opt, where: None), 60, lambda s: masked_are_zero(model) or pytest.fail('not masked'))

# ------------------------------------------------------------ one update
def test_a_failing_update_changes_nothing_and_keeps_little():
    calls = []
    def grow(p, mask=None, **kwargs):
        calls.append(1)
        if len(calls)==3: raise RuntimeError('no score')
        return p.grad.abs()
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    engine_step(model, opt, 1)
    backward(model, *batches(1)[0])
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match='no score'): METHOD(grow_score_f=grow).update(model, opt, 8, .1)
    after = snapshot(model, opt)
    assert len(calls)==3 and all(torch.equal(before[k], after[k]) for k in before)

def test_gradients_whose_sum_overflows_are_finite():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for p in model.parameters(): p.grad = torch.full_like(p, 3e38)
    assert not METHOD().update(model, opt, 8, .1)                                            # it is made, in the step's place
    model[2].weight.grad[0,0],model[2].weight.grad[0,1] = math.inf,-math.inf
    with pytest.warns(UserWarning, match='not finite'): METHOD().update(model, opt, 16, .1)

# ------------------------------------------------------------ gradients that nobody reads
@pytest.mark.parametrize('preset', [GMP_presets, ACDC_presets], ids=['GMP', 'ACDC'])
def test_a_method_that_grows_nothing_leaves_no_gradient_dense(preset):
    "Not on its update steps either: momentum would take what lies outside the masks"
    model,method = sparse_mlp(),DSTMethod(**{**preset, 'batches_per_update': 2})
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    for step in range(1, 9):
        backward(model, *batches(1, seed=step)[0])
        assert not method.needs_dense_grad(step, total=100)
        if method.before_step(model, opt, step, total=100):
            assert all((p.grad[~mask]==0).all() for *_,p,mask in masked_params(model)), step
            opt.step(); method.after_step(model, opt, step, total=100)

# ------------------------------------------------------------ what a step asks of an accelerator
class Count(TorchDispatchMode):
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += 1
        return f(*args, **(kwargs or {}))

def operations(model, opt_f, masked, x, y):
    "Operations of the fifth step, on the meta device, where nothing can be read back; none of the five is an update"
    if masked: sparsify_model(model, .9)
    model = model.to('meta')
    opt,method = opt_f(model.parameters()),DSTMethod(**RigL_presets)
    for step in range(1, 6):
        with Count() as c:
            nn.functional.cross_entropy(model(x.to('meta')), y.to('meta')).backward()
            if masked: method.step(model, opt, step, total=1000)
            else: opt.step()
            opt.zero_grad()
    return c.n

@pytest.mark.parametrize('opt_f', [partial(torch.optim.SGD, lr=.1, momentum=.9, foreach=True), partial(torch.optim.AdamW, foreach=True)], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('make', [lambda: torchvision.models.resnet18(num_classes=10), lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), *[nn.Linear(512, 512) for _ in range(39)])], ids=['resnet18', 'forty layers'])
def test_a_masked_step_asks_an_accelerator_for_few_operations(make, opt_f):
    x,y = torch.randn(4, 3, 32, 32),torch.zeros(4, dtype=torch.long)
    dense,sparse = (operations(make(), opt_f, m, x, y) for m in (False, True))
    assert sparse-dense<=16

# ------------------------------------------------------------ a part of a model by itself, and a failed forward
def test_a_layer_that_is_called_by_itself_is_masked():
    model = sparse_mlp()
    for mode in (True, False):
        model.train(mode)
        with torch.set_grad_enabled(mode):
            model(X)
            each(fill)(model)
            model[0](X)
        assert (model[0].weight[~model[0].weight_mask]==0).all() and dirty(model)            # the others were not used
        model(X)
        assert not dirty(model)

def test_after_a_forward_that_failed():
    "Guards of layers act again at once, and guards can be removed"
    model = sparse_mlp()
    with pytest.raises(RuntimeError): model(torch.randn(4, 9))
    each(fill)(model)
    model[0](X)
    assert (model[0].weight[~model[0].weight_mask]==0).all()
    model(X)
    assert not dirty(model)
    enforce_masks(model).remove()
    assert not any([m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in model.modules()])

# ------------------------------------------------------------ writes by other libraries
@pytest.mark.parametrize('write', [lambda p: p.data.add_(.01*torch.randn_like(p)), lambda p: p.data.copy_(torch.randn_like(p)), lambda p: p.data.lerp_(torch.randn_like(p), .1)], ids=['peft merges', 'averages are copied', 'averages are mixed in'])
def test_writes_to_a_whole_weight_between_two_evaluations(write):
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    sparsify_model(model, .9)
    x = torch.randn(4, 16)
    with torch.no_grad():
        model(x)
        each(write)(model)
        model(x)
    assert not dirty(model)

def test_a_masked_step_in_a_loop_of_ones_own_counts_as_a_write():
    "Autograd refuses a backward pass through weights that a step has changed since"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    STILL().step(model, opt, 1, total=100)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()

def test_a_state_loaded_just_after_a_step_is_masked_where_nobody_can_look():
    "Torch counts the write, so the engine's word no longer holds; on a GPU, too, where no guard looks at weights"
    model = sparse_mlp().to('meta')
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    x,y = torch.zeros(4, 8, device='meta'),torch.zeros(4, dtype=torch.long, device='meta')
    nn.functional.cross_entropy(model(x), y).backward()
    STILL().step(model, opt, 2, total=100)
    whole = next(g for m,_,g in guards(model) if m is model)
    with torch.no_grad(): model[0].weight.add_(1.)
    with Count() as c: whole(model)
    assert c.n>=3                                                                            # every weight is masked
    STILL().step(model, opt, 3, total=100)
    with Count() as c: whole(model)
    assert c.n==0

def test_attention_that_is_called_by_itself_masks_what_it_reads_of_its_child():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3))
    sparsify_model(model, .5)
    x = torch.randn(2, 3, 8)
    each(fill)(model)
    model[0](x, x, x)
    assert not dirty(model[0]) and dirty(model[1])

# ------------------------------------------------------------ exports of one's own
EXPORTS = dict(export=lambda m, x: torch.export.export(m, (x,)).module(), strict=lambda m, x: torch.export.export(m, (x,), strict=True).module(), trace=lambda m, x: torch.jit.trace(m, (x,)))
@pytest.mark.parametrize('how', EXPORTS)
@pytest.mark.parametrize('kind', ['mlp', 'attention'])
def test_a_masked_model_is_exported_without_its_guards(how, kind):
    if kind=='mlp': model,x = sparse_mlp().eval(),X
    else:
        model,x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),torch.randn(2, 3, 8)
        sparsify_model(model, .5)
    want = model(x)
    with torch.no_grad(): assert torch.allclose(EXPORTS[how](model, x)(x), want, atol=1e-6)
    each(fill)(model)
    model(x)
    assert not dirty(model)                                                                  # guards go on with their work

def test_a_masked_model_is_exported_to_onnx_by_torch_itself(tmp_path):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = sparse_mlp().eval()
    torch.onnx.export(model, (X,), tmp_path/'m.onnx', verbose=False)
    s = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    assert torch.allclose(torch.from_numpy(s.run(None, {s.get_inputs()[0].name: X.numpy()})[0]), model(X), atol=1e-5)

def test_script_is_refused_in_one_sentence():
    with pytest.raises(RuntimeError, match=r'torch.jit.script cannot compile .* `bake\(model\)`.*to_onnx'): torch.jit.script(sparse_mlp())
    from sparsefast.ship.export import bake
    assert torch.allclose(torch.jit.script(bake(sparse_mlp()))(X), sparse_mlp()(X))

# ------------------------------------------------------------ threads, offloaded and sharded weights
@pytest.mark.parametrize('write', [each(versioned), each(other)], ids=['counted', 'other data'])
def test_a_write_while_another_thread_masks_is_seen_by_the_next_evaluation(write, monkeypatch):
    "However the two fall together: here the write comes when masking is done, and before the guard has noted it"
    model,mask = sparse_mlp().eval(),MaskGuard._mask
    monkeypatch.setattr(MaskGuard, '_sees_nonzero', lambda self, pairs: False)                # as on a GPU, or where one weight is written
    def slow(self): mask(self); monkeypatch.setattr(MaskGuard, '_mask', mask); write(model)
    monkeypatch.setattr(MaskGuard, '_mask', slow)
    with torch.no_grad():
        model(X)
        assert dirty(model)
        model(X)
    assert not dirty(model)

@pytest.mark.parametrize('write', sorted(SILENT | {'fused', 'fused_sgd', 'fast_sgd', 'fast_adam'}))
def test_a_silent_write_to_whole_layers_does_not_outlive_an_evaluation_on_a_cpu(write):
    model = sparse_mlp().eval()
    with torch.no_grad(): model(X); model(X)
    WRITES[write](model)
    assert dirty(model)
    with torch.no_grad(): model(X)
    assert not dirty(model)

@pytest.mark.parametrize('grad', [False, True])
def test_offloaded_weights(grad):
    "accelerate keeps weights elsewhere, with nothing but their shapes in the model, and brings each in for its layer's forward pass"
    accelerate = pytest.importorskip('accelerate')
    model = sparse_mlp()
    want = model(X)
    accelerate.cpu_offload(model, torch.device('cpu'))
    assert model[0].weight.is_meta and not model[0].weight_mask.is_meta
    with torch.set_grad_enabled(grad):
        for _ in range(3): assert torch.equal(model(X), want)
        assert torch.equal(model.eval()(X), want) and torch.equal(model(X), want)

def test_fsdp_1_is_refused_by_name_before_anything_is_computed():
    import subprocess, sys
    code = """
import os, torch, torch.distributed as dist
dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from sparsefast import ops
from sparsefast.all import *
def said(f):
    try: f(); print('nothing')
    except ValueError as e: print(e)
for flat in (True, False):
    for whole in (True, False):
        for guarded in (True, False):
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            sparsify_model(model, .5, enforce_mask=guarded)
            kw = dict(use_orig_params=not flat, device_id=torch.device('cpu'))
            if whole: model = FSDP(model, **kw)
            else: model[0] = FSDP(model[0], **kw)
            opt = torch.optim.SGD(model.parameters(), lr=.1)
            if guarded: said(lambda: model(torch.randn(2, 4)))
            else:
                model(torch.randn(2, 4)).sum().backward()
                said(lambda: DSTMethod(**Static_presets).step(model, opt, 1, total=10))
"""
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    lines = p.stdout.splitlines()
    assert len(lines)==8 and all('FullyShardedDataParallel' in l and 'is sharded over processes' in l for l in lines), p.stdout+p.stderr[-2000:]

@pytest.mark.parametrize('convert', [lambda m: m.double(), lambda m: m.load_state_dict(m.state_dict())], ids=['double', 'load'])
def test_torchs_swap_of_parameters_on_conversion(convert):
    "A guard keeps no reference to a weight that would forbid it"
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = sparse_mlp().eval()
        with torch.no_grad(): model(X); model(X)
        convert(model)
        each(fill)(model)
        with torch.no_grad(): model(X.to(model[0].weight.dtype))
        assert not dirty(model)
    finally: torch.__future__.set_swap_module_params_on_conversion(False)

# ------------------------------------------------------------ the meta device
def on_meta(**kw):
    with torch.device('meta'): model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    sparsify_model(model, .6, **kw)
    return model

@pytest.mark.parametrize('kw', [{}, dict(sparse_f='erk'), dict(keep_dense=True), dict(score_f=weight_magnitude), dict(pattern_f=nm_pattern), dict(initial_sparsity=.2), dict(init_f=sparse_kaiming_normal_)], ids=lambda kw: ' '.join(kw))
def test_a_model_on_the_meta_device_gets_masks_that_are_loaded(kw):
    model = on_meta(**kw)
    assert all(b.is_meta for b in model.buffers()) and len(list(masked_params(model)))==2
    with torch.device('cpu'): real = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    sparsify_model(real, .6, **kw)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model(X), real(X)) and [t for *_,t in sparse_params(model)]==[t for *_,t in sparse_params(real)]
    each(fill)(model)
    model(X)
    assert not dirty(model) and len(model._forward_pre_hooks)==1

@pytest.mark.parametrize('fill_value', [0, 1e-310, math.nan, .6])
def test_masks_from_the_meta_device_that_nobody_has_loaded_are_refused(fill_value):
    "As after loading a dense checkpoint: there are weights, and masks are whatever was in memory"
    model = on_meta().to_empty(device='cpu')
    with torch.no_grad():
        for n,t in [*model.named_parameters(), *model.named_buffers()]: t.fill_(fill_value if 'sparsity' in n else 'mask' not in n)
    for _ in range(2):
        with pytest.raises(ValueError, match='has no values.*sparsify_model` after loading'): model(X)
    assert (model[0].weight==1).all()                                                        # nothing is cut off

def test_a_hugging_face_class_that_makes_its_masks_itself(tmp_path):
    tf = pytest.importorskip('transformers')
    tf.utils.logging.disable_progress_bar()
    tf.utils.logging.set_verbosity_error()
    config = tf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    class SparseBert(tf.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            sparsify_model(self, .8)
    torch.manual_seed(0)
    model,x = SparseBert(config).eval(),torch.randint(50, (2, 5))
    model.save_pretrained(tmp_path/'sparse')
    again = SparseBert.from_pretrained(tmp_path/'sparse').eval()
    assert torch.equal(again(x).logits, model(x).logits) and masked_are_zero(again)
    for (p,mask,s),(q,other,t) in zip(sparse_params(model), sparse_params(again)): assert torch.equal(p, q) and torch.equal(mask, other) and s==t
    half = SparseBert.from_pretrained(tmp_path/'sparse', dtype=torch.bfloat16)
    assert half.classifier.weight.dtype==torch.bfloat16 and [t for *_,t in sparse_params(half)]==[t for *_,t in sparse_params(model)]
    tf.BertForSequenceClassification(config).save_pretrained(tmp_path/'dense')
    dense = SparseBert.from_pretrained(tmp_path/'dense').eval()
    with pytest.raises(ValueError, match='sparsify_model` after loading'): dense(x)
