"What is left out for speed changes nothing: hooks and the engine skip work only where it would do nothing"
import copy, io, math, pickle
from functools import partial
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai.optimizer import Adam as fastAdam, Lamb, Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, SGD as fastSGD, ranger
from helpers import PRESETS, TORCH_OPTS, Watch, backward, batches, learner, masked_are_zero, opt_tensors, plain_loop, snapshot, sparse_mlp
from sparsefast import masks as M, methods, rewire
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.attach import attach
from sparsefast.masks import apply_masks, looks_masked, masked_params, noted, sample_masked, top_k_mask, widened, zero_masked_
from sparsefast.methods import DSTMethod, keeps_zeros
from sparsefast.presets import RigL_presets, Static_presets
from sparsefast.sparsify import add_mask, enforce_masks, sparsify_model, unsparsify_model

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
@pytest.mark.parametrize('threads', [1, 2])
def test_masking_in_pieces_is_masking(dtype, layout, threads, monkeypatch):
    monkeypatch.setattr(M, '_piece', 50)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    t = (torch.randn(5,4,3,3)*10).to(dtype)
    if dtype.is_floating_point: t.view(-1)[::7],t.view(-1)[1::7],t.view(-1)[2::7] = math.nan,-math.inf,-0.
    mask = torch.rand(5,4,3,3)<.5
    if layout!='contiguous': t = t.to(memory_format=torch.channels_last) if layout!='transposed' else t.transpose(0,1).contiguous().transpose(0,1)
    if layout=='channels_last': mask = mask.to(memory_format=torch.channels_last)
    want = torch.where(mask, t, torch.zeros((), dtype=dtype))
    version,buffer = t._version,np.getbufsize()
    out = zero_masked_(t, mask)
    assert t._version>version and np.getbufsize()==buffer                    # autograd and our notes count writes; numpy is set as it was
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    assert out is t and torch.equal(t.contiguous().view(bits), want.contiguous().view(bits))          # bit for bit: NaN and -0.0 stay or are +0.0

def test_large_weights_are_masked_without_memory(monkeypatch):
    "`torch.func` hands out tensors that numpy cannot see"
    monkeypatch.setattr(M, '_piece', 50)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    t,mask = torch.randn(3, 64), torch.rand(64)<.5
    want = torch.where(mask, t, 0.)
    assert torch.equal(torch.func.vmap(lambda r: zero_masked_(r.clone(), mask))(t), want)
    assert torch.equal(torch.func.grad(lambda r: (zero_masked_(r.detach().clone(), mask)*r).sum())(t[0]), want[0])

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
    assert torch.equal(M._by_sorts(t, k, among), want)                                       # what a GPU does

def test_the_sample_is_used_and_may_mislead(monkeypatch):
    t = torch.randn(N)
    used = []
    real = M._sampled
    monkeypatch.setattr(M, '_sampled', lambda *a: used.append(r := real(*a)) or r)
    assert torch.equal(top_k_mask(t, 500), by_sort(t, 500)) and used.pop() is not None
    t[::len(t)//(1<<14)|1] = 99.                                                             # all that the sample sees is high
    assert torch.equal(top_k_mask(t, N//3), by_sort(t, N//3)) and used.pop() is None

@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_first_ones(bits, data):
    b = torch.tensor(bits)
    n = data.draw(st.integers(0, int(b.sum())))
    want = b.clone(); want[b.nonzero().flatten()[n:]] = False
    assert torch.equal(M._first(b.clone(), n), want)

def test_first_ones_of_many():
    b = torch.rand(50_000)<.3
    for n in (0, 1, 7000, int(b.sum())):
        want = b.clone(); want[b.nonzero().flatten()[n:]] = False
        assert torch.equal(M._first(b.clone(), n), want)

def test_a_known_number_of_candidates_is_not_counted():
    t,among = torch.arange(6.), torch.tensor([1,1,1,0,0,0]).bool()
    assert torch.equal(top_k_mask(t, 2, among=among, n_among=3), top_k_mask(t, 2, among=among))
    with pytest.raises(ValueError, match='number of candidates, 3, got 4'): top_k_mask(t, 4, among=among, n_among=3)

# ------------------------------------------------------------ what is noted, and what ends it
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

@pytest.mark.parametrize('write', WRITES.keys()-SILENT-{'fused', 'fused_sgd', 'fast_sgd', 'fast_adam'})
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

def test_a_module_that_trains_and_uses_a_layer_that_does_not():
    "Its hook passes it before the inputs; one with keywords passes no module, and is no mistake"
    layer = sparse_mlp()[0].eval()
    with torch.no_grad():
        for parent,masked in ((nn.Identity().train(), True), (nn.Identity().eval(), False)):
            M.keep_masked(layer, parent, (X,))
            layer.weight.data.fill_(1.)                                                      # not counted by torch
            M.keep_masked(layer, parent, (X,))
            assert (not dirty(layer))==masked
        M.keep_masked(layer.train(), (X,), {})
    assert not dirty(layer)

def count_masking(monkeypatch):
    "How many layers a hook masks"
    n = []
    monkeypatch.setattr(M, 'apply_masks', lambda m: n.append(m) or apply_masks(m))
    return n

def test_hooks_do_nothing_where_nothing_happened(monkeypatch):
    model,n = sparse_mlp(),count_masking(monkeypatch)
    with torch.no_grad():
        for _ in range(3): model.eval()(X)
    assert len(n)==3                                                                         # three layers, the first time only
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

def test_weights_are_masked_after_a_step_only_where_needed(monkeypatch):
    model,n = sparse_mlp(),[]
    ps = {p.data_ptr() for *_,p,_ in masked_params(model)}
    monkeypatch.setattr(methods, 'zero_masked_', lambda t, mask, wide=None: n.append(t.data_ptr()) or zero_masked_(t, mask, wide))
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    count = []
    for s in range(1, 40):
        n.clear()
        engine_step(model, opt, s)
        count.append(sum(i in ps for i in n))
        assert masked_are_zero(model)
    assert count[0]==6 and count[1:29]==[0]*28 and sum(count[29:])==3                        # the first step (and `enforce`), then each layer every 32nd

@pytest.mark.parametrize('copy_f', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_a_copy_knows_nothing(copy_f):
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X)
        twin = copy_f(model)
        each(fill)(twin)
        twin(X)
        assert not dirty(twin) and not dirty(model)
        assert all(noted(p, mask) for *_,p,mask in masked_params(model))
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
    state = torch.load(f, weights_only=True)
    assert not any('masked' in vars(v.untyped_storage()) for v in state.values())

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

def test_memory_that_is_used_again_bears_no_note():
    model = sparse_mlp().eval()
    with torch.no_grad():
        model(X)
        for _ in range(20):
            each(other)(model)
            each(other)(model)                                                               # the allocator may give the first memory back
            model(X)
            assert not dirty(model)

def test_memory_turned_round_bears_no_note():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify_model(model.eval(), .5)
    with torch.no_grad():
        model(X)
        model[0].weight.data = model[0].weight.data.t()
        model(X)
    assert not dirty(model)

def test_two_parameters_over_the_same_memory():
    a,b = nn.Linear(4,4), nn.Linear(4,4)
    b.weight = nn.Parameter(a.weight.data)
    for m in (a,b): add_mask(m, 'weight', torch.eye(4).bool()); enforce_masks(m); m.eval()
    x = torch.randn(2,4)
    with torch.no_grad():
        a(x); b.weight.add_(1.); b(x)
    assert not dirty(b)

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

# ------------------------------------------------------------ which optimizers leave zeros alone
o = torch.optim
ZERO = dict(sgd=partial(o.SGD, lr=.1), nesterov=partial(o.SGD, lr=.1, momentum=.9, nesterov=True, weight_decay=.1), maximize=partial(o.SGD, lr=.1, momentum=.9, dampening=.1, maximize=True),
            sgd_foreach=partial(o.SGD, lr=.1, momentum=.9, weight_decay=.1, foreach=True), sgd_fused=partial(o.SGD, lr=.1, momentum=.9, weight_decay=.1, fused=True),
            adam=partial(o.Adam, lr=.01), amsgrad=partial(o.Adam, lr=.01, amsgrad=True, weight_decay=.1), adam_max=partial(o.Adam, lr=.01, maximize=True), adam_foreach=partial(o.Adam, lr=.01, foreach=True),
            adam_fused=partial(o.Adam, lr=.01, fused=True), adamw=partial(o.AdamW, lr=.01, weight_decay=.1), adamw_fused=partial(o.AdamW, lr=.01, weight_decay=.1, fused=True), adamw_foreach=partial(o.AdamW, lr=.01, foreach=True),
            nadam=partial(o.NAdam, lr=.01, weight_decay=.1), nadam_d=partial(o.NAdam, lr=.01, weight_decay=.1, decoupled_weight_decay=True), radam=partial(o.RAdam, lr=.01, weight_decay=.1), adamax=partial(o.Adamax, lr=.01),
            rmsprop=partial(o.RMSprop, lr=.01, centered=True, momentum=.9), adagrad=partial(o.Adagrad, lr=.01, initial_accumulator_value=.1), adagrad0=partial(o.Adagrad, lr=.01), adagrad_fused=partial(o.Adagrad, lr=.01, fused=True),
            adadelta=partial(o.Adadelta, lr=1.), f_sgd=partial(fastSGD, lr=.1, mom=.9, wd=.1), f_sgd_l2=partial(fastSGD, lr=.1, mom=.9, wd=.1, decouple_wd=False), f_adam=partial(fastAdam, lr=.01, wd=.1), f_rms=partial(RMSProp, lr=.01, mom=.9, wd=.1),
            f_radam=partial(RAdam, lr=.01, wd=.1), f_qh=partial(QHAdam, lr=.01, wd=.1), wrapped=lambda ps: OptimWrapper(ps, partial(o.AdamW, lr=.01)))
@pytest.mark.parametrize('name', ZERO)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_optimizers_that_keep_zeros(name, dtype):
    "Bit for bit, over many steps and large and small gradients"
    p = nn.Parameter(torch.zeros(64, dtype=dtype))
    opt = ZERO[name]([p])
    on = torch.arange(64)%4==0
    assert keeps_zeros(opt)
    p.data[on] = torch.randn(16).to(dtype)
    for step in range(20):
        p.grad = (torch.randn(64)*10.**(step%7-3)).to(dtype)*on
        opt.step()
        assert (p.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()])[~on]==0).all()
    assert (p.data[on]!=0).any()

class Own(torch.optim.SGD): pass
@pytest.mark.parametrize('make', [lambda p: o.Adam(p, eps=0.), lambda p: o.SGD(p, lr=math.inf), lambda p: o.SGD(p, lr=math.nan), lambda p: o.SGD(p, lr=2., weight_decay=1.), lambda p: o.SGD(p, lr=torch.tensor(math.inf), foreach=False), lambda p: o.SGD([dict(params=p), dict(params=[nn.Parameter(torch.ones(2))], lr=math.nan)], lr=.1),
                                  lambda p: o.LBFGS(p), lambda p: o.Adafactor(p), lambda p: o.Rprop(p), lambda p: o.ASGD(p), lambda p: Own(p, lr=.1), lambda p: Lamb(p, lr=.1), lambda p: Larc(p, lr=.1), lambda p: ranger(p, lr=.1), lambda p: Lookahead(fastSGD(p, lr=.1)), lambda p: fastAdam(p, lr=.1, eps=0.)])
def test_all_others_do_not_count_as_such(make): assert not keeps_zeros(make([nn.Parameter(torch.zeros(2, 2))]))

# ------------------------------------------------------------ wide masks
def wide_masks(model): return [noted(p, mask, written=True).get('wide') for *_,p,mask in masked_params(model)]

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed'])
def test_a_wide_mask_masks_alike(dtype, layout):
    "NaN and infinity included, and it lies in memory as the numbers do"
    t,mask = torch.randn(6, 4, 3, 3).mul(9).to(dtype), torch.rand(6, 4, 3, 3)<.5
    if dtype.is_floating_point: t[0] = torch.nan; t[1] = torch.inf
    if layout=='channels_last': t = t.to(memory_format=torch.channels_last)
    if layout=='transposed': t,mask = t.transpose(0, 1), mask.transpose(0, 1)
    wide = widened(mask, t)
    assert (wide is None)==(dtype==torch.complex128) or wide.stride()==t.stride() and wide.element_size()==t.element_size()
    want = zero_masked_(t.clone(), mask)
    assert torch.equal(zero_masked_(t.clone(), mask, wide).nan_to_num(5.), want.nan_to_num(5.)) and (want[~mask]==0).all()

def test_a_wide_mask_of_another_width_is_not_used():
    t,mask = torch.ones(4), torch.tensor([True,False,True,False])
    assert zero_masked_(t, mask, widened(~mask, t.double())).tolist()==[1,0,1,0]

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', ['momentum', 'adam'])
def test_wide_masks_change_nothing(preset, opt):
    "Weights, masks and state, bit for bit, over many updates; `wide_masks=False` keeps none"
    runs = []
    for wide in (False, True):
        model = sparse_mlp()
        optim = TORCH_OPTS[opt](model.parameters())
        plain_loop(model, optim, DSTMethod(**{**PRESETS[preset], 'batches_per_update': 7, 'wide_masks': wide}), total=90)
        runs.append(snapshot(model, optim))
        if not wide: assert wide_masks(model)==[None]*3
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[1]) and runs[0].keys()==runs[1].keys()

def test_wide_masks_are_kept_while_masks_stand_still():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    for s in range(1, 4): engine_step(model, opt, s)
    wide = wide_masks(model)
    assert all(w.dtype==torch.int32 and torch.equal(w.bool(), mask) for w,(*_,mask) in zip(wide, masked_params(model)))
    engine_step(model, opt, 4)
    assert all(w is v for w,v in zip(wide, wide_masks(model)))
    engine_step(model, opt, 8, METHOD())                                     # an update
    for s in (9, 10): engine_step(model, opt, s)
    assert all(w is not v and torch.equal(v.bool(), mask) for w,v,(*_,mask) in zip(wide, wide_masks(model), masked_params(model)))
    assert not dirty(model)

@pytest.mark.parametrize('edit', ['counted', 'not counted'])
def test_an_edited_mask_is_what_gradients_are_masked_by(edit):
    "At once if torch counts the edit, else within 32 steps"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for s in range(1, 4): engine_step(model, opt, s)
    new = ~model[0].weight_mask
    (model[0].weight_mask if edit=='counted' else model[0].weight_mask.data).copy_(new)
    for s in range(4, 5 if edit=='counted' else 36): engine_step(model, opt, s)
    assert masked_are_zero(model) and (model[0].weight.grad[~new]==0).all() and model[0].weight.grad[new].any()

@pytest.mark.parametrize('end', ['release', 'attached', 'callback', 'unsparsify'])
def test_wide_masks_go_when_training_ends(end):
    model = sparse_mlp()
    ps = [p for *_,p,_ in masked_params(model)]
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    if end=='attached': attached = attach(STILL(), model, opt, 1000)
    if end=='callback':
        had = []
        learn = learner(model)
        learn.fit(2, cbs=[DynamicSparseTrainingCallback(**{**Static_presets, 'batches_per_update': 1000}), Watch('after_step', lambda l: had.append(wide_masks(model)[0] is not None))])
        assert not had[0] and all(had[1:])
    else:
        for s in range(1, 4):
            if end=='attached':
                backward(model, *batches(1)[0])
                opt.step()
            else: engine_step(model, opt, s)
        assert None not in wide_masks(model)
    if end=='release': STILL().release([model[0], *list(model)[1:]])
    if end=='attached': attached.remove()
    if end=='unsparsify': unsparsify_model(model)
    assert not any('wide' in n for p in ps for n in vars(p.untyped_storage())['masked'].values())

# ------------------------------------------------------------ looking at a weight
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'transposed', 'part of a larger one'])
def test_looking_sees_each_place_of_the_sample_and_no_other(dtype, layout):
    p,mask = torch.zeros(6, 4, 3, 3, dtype=dtype), torch.rand(6, 4, 3, 3)<.5
    if layout=='channels_last': p = p.to(memory_format=torch.channels_last)
    if layout=='transposed': p,mask = p.transpose(0, 1), mask.transpose(0, 1)
    if layout=='part of a larger one': p = torch.zeros(9, 9, 5, 7, dtype=dtype)[2:8, 1:5, 1:4, ::3]
    sample = sample_masked(p, mask)
    seen = []
    for i in range(p.numel()):
        at = tuple(int(j) for j in torch.unravel_index(torch.tensor(i), p.shape))
        p[at] = 1e-7 if dtype!=torch.complex64 else 1e-7j
        if not looks_masked(p, sample): seen.append(at)
        p[at] = 0
    assert len(seen)==16 and not any(mask[at] for at in seen) and looks_masked(p, sample)

def test_where_looking_does_not_help():
    p,mask = torch.zeros(4, 4, dtype=torch.complex128), torch.rand(4, 4)<.5
    assert sample_masked(p, mask) is None and not looks_masked(p, None)                      # 16 bytes a number
    large = torch.ones(1<<14, dtype=torch.bool)
    large[1] = False                                                                        # a sample does not find it
    assert sample_masked(torch.zeros(1<<14), large) is None
    full = torch.ones(3, dtype=torch.bool)
    assert looks_masked(torch.ones(3), sample_masked(torch.ones(3), full))                   # nothing to look at, and all has been looked at
    assert not looks_masked(torch.empty(0), sample_masked(torch.ones(4), torch.zeros(4, dtype=torch.bool)))      # memory that has gone

# ------------------------------------------------------------ the step, with and without the pass over the weights
def always(monkeypatch): monkeypatch.setattr(methods, '_is_kept', lambda l, n: False)

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', ['sgd', 'momentum', 'adam', 'adamw', 'rmsprop', 'adagrad'])
def test_leaving_the_pass_out_changes_nothing(preset, opt, monkeypatch):
    "Weights, masks and state, bit for bit, over many updates"
    if preset=='SNFS' and opt in ('sgd', 'adagrad'): pytest.skip('needs momentum')
    runs = []
    for full in (False, True):
        with monkeypatch.context() as mp:
            if full: always(mp)
            model = sparse_mlp()
            optim = TORCH_OPTS[opt](model.parameters())
            plain_loop(model, optim, DSTMethod(**{**PRESETS[preset], 'batches_per_update': 7}), total=90)
            runs.append(snapshot(model, optim))
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[1]) and runs[0].keys()==runs[1].keys()

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
    "The state is not the one that the last step left"
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
    "Neither 16 places nor torch's count show it; within 32 steps it is gone, and before an evaluation"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300))
    sparsify_model(model, .9)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    def step(s):
        model.zero_grad()
        model(torch.ones(2, 300)).sum().backward()
        STILL().step(model, opt, s, 0.)
    for s in range(1, 4): step(s)
    places = set(sample_masked(model[0].weight, model[0].weight_mask)[1])
    i = next(i for i in (~model[0].weight_mask).flatten().nonzero().flatten().tolist() if i not in places)
    for last in ('steps', 'evaluation'):
        model[0].weight.data.view(-1)[i] = 1.
        if last=='evaluation':
            with torch.no_grad(): model.eval()(torch.ones(2, 300))
        else:
            for s in range(4, 40): step(s)
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
    grow.needs_grad = True
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
    engine_step(model, opt, 1)
    backward(model, *batches(1)[0])
    before = snapshot(model, opt)
    with pytest.raises(RuntimeError, match='no score'): METHOD(grow_score_f=grow).update(model, opt, 8, .1)
    after = snapshot(model, opt)
    assert len(calls)==3 and all(torch.equal(before[k], after[k]) for k in before)

@given(st.integers(0, 70), st.integers(0, 3))
@settings(max_examples=30)
def test_packing(n, seed):
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed))<.5
    bits = rewire._pack(mask)
    assert bits.numel()==-(-n//8) and torch.equal(rewire._unpack(bits, mask), mask) and rewire._unpack(mask, mask) is mask

def test_new_masks_wait_as_bits():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    backward(model, *batches(1)[0])
    layers = rewire.sparse_layers(model)
    news = rewire.plan(METHOD(), layers, 1., dict(opt=opt, step=8, pct=.1))[0]
    assert all(new.dtype==torch.uint8 and new.numel()==-(-l.p.numel()//8) for new,l in zip(news, layers))

def test_gradients_whose_sum_overflows_are_finite():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for p in model.parameters(): p.grad = torch.full_like(p, 3e38)
    assert METHOD().update(model, opt, 8, .1)
    model[2].weight.grad[0,0],model[2].weight.grad[0,1] = math.inf,-math.inf
    with pytest.warns(UserWarning, match='not finite'): METHOD().update(model, opt, 16, .1)
