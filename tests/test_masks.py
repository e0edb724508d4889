"Masks: exact counts, exact selection, the naming convention"
import copy, math, pickle, warnings
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
import reference
from helpers import backward, batches, mlp, plain_loop
from sparsefast.attach import attach
from sparsefast.guard import enforce_masks
from sparsefast.masks import *
from sparsefast.methods import DSTMethod
from sparsefast.noted import lost_masks
from sparsefast.presets import RigL_presets
from sparsefast.see.doctor import sparse_doctor
from sparsefast.ship.shrink import shrink_model
from sparsefast.sparsify import add_mask, load_sparse_state, sparsify_model, unsparsify_model
from sparsefast.storage import to_masked_layers, to_sparse_layers
from sparsefast.topk import top_k_mask
from sparsefast.utils import maybe_float

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)
sparsities = st.floats(0, 1)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]

# ------------------------------------------------------------ making masks
@given(shapes, sparsities)
def test_count_is_exact(shape, sparsity):
    mask = sparse_mask(shape, sparsity)
    assert mask.dtype==torch.bool and mask.shape==shape
    assert int(mask.sum())==round((1-sparsity)*math.prod(shape))==n_active(math.prod(shape), sparsity)

@pytest.mark.parametrize('sizes,sparsity,ones', [((10,5),.8,10), ((30,4),.5,60), ((1,2,1,4),.8,2), ((30,),.1,27), (10,.3,7),
                                                 (torch.Size([4,5]),0,20), ((4,5),1,0), ((0,3),.5,0), ((),0,1)], ids=str)
def test_counts(sizes, sparsity, ones):
    mask = sparse_mask(sizes, sparsity)
    assert mask.sum()==ones and mask.shape==torch.zeros(sizes).shape

@given(st.integers(0, 2**23), sparsities | st.integers(0, 1000).map(lambda i: i/1000))
def test_stored_sparsity_has_the_same_count(numel, sparsity):
    t = stored_sparsity(sparsity, numel)
    assert n_active(numel, t)==n_active(numel, sparsity) and abs(float(t)-sparsity)<=2**-23

@pytest.mark.parametrize('sparsity', [.9, .98, .3])
def test_stored_sparsity_at_ties(sparsity):
    "Counts that lie between two: single precision would tip them over"
    numels = [n for n in range(5, 5000, 5) if n_active(n, torch.tensor(sparsity))!=n_active(n, sparsity)]
    assert numels and all(n_active(n, stored_sparsity(sparsity, n))==n_active(n, sparsity) for n in numels)

def test_seed_fixes_the_mask():
    draw = lambda seed: (torch.manual_seed(seed), sparse_mask((20,20), .7))[1]
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    gen = lambda seed: sparse_mask((20,20), .7, generator=torch.Generator().manual_seed(seed))
    before = torch.get_rng_state()
    assert torch.equal(gen(3), gen(3)) and not torch.equal(gen(3), gen(4)) and torch.equal(before, torch.get_rng_state())

def test_every_position_is_equally_likely():
    n,s = 4000,.75
    freq = torch.stack([sparse_mask((4,5), s) for _ in range(n)]).float().mean(0)
    assert (freq-(1-s)).abs().max() < 5*math.sqrt(s*(1-s)/n)
    pairs = torch.stack([sparse_mask(4, .5) for _ in range(n)]).float()                   # each of the six pairs
    together = (pairs.T@pairs/n)[~torch.eye(4, dtype=torch.bool, device='cpu')]
    assert (together-1/6).abs().max() < 5*math.sqrt(5/36/n)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_same_mask_for_every_dtype(dtype):
    like = lambda dt: (torch.manual_seed(1), sparse_mask_like(torch.ones(7,9, dtype=dt), .6))[1]
    assert torch.equal(like(dtype), like(torch.float32)) and like(dtype).dtype==torch.bool

def test_mask_like_takes_shape_and_device(): assert sparse_mask_like(torch.empty(3,4, device='meta'), .5).device.type=='meta'

# ------------------------------------------------------------ selection
values = st.sampled_from([0., -0., 1., -1., .5, 2., math.inf, -math.inf, 1e-30, 3e4])

@given(st.data(), st.lists(values, min_size=1, max_size=40), st.sampled_from(DTYPES[:4]))
def test_top_k_equals_reference(data, scores, dtype):
    t = torch.tensor(scores, dtype=dtype)
    k = data.draw(st.integers(0, len(scores)))
    assert set(top_k_mask(t, k).nonzero().flatten().tolist())==reference.top_k(t.double().tolist(), k)

@given(st.data(), st.lists(st.floats(-5, 5, width=16) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=30))
def test_top_k_among_equals_reference(data, scores):
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    k = data.draw(st.integers(0, int(among.sum())))
    mask = top_k_mask(torch.tensor(scores), k, among=among)
    assert not (mask & ~among).any()
    assert set(mask.nonzero().flatten().tolist())==reference.top_k(scores, k, among.nonzero().flatten().tolist())

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('k', range(0, 13, 3))
def test_top_k_dtypes(dtype, k):
    t = torch.tensor([[1,0,1,0],[0,1,1,1],[0,0,1,1]]).to(dtype)
    mask = top_k_mask(t, k)
    assert mask.dtype==torch.bool and mask.shape==t.shape
    assert set(mask.flatten().nonzero().flatten().tolist())==reference.top_k(t.flatten().tolist(), k)

@pytest.mark.parametrize('fill', [0., math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize('k', [0,1,5,11,12])
def test_top_k_all_equal_takes_the_first(fill, k):
    assert top_k_mask(torch.full((3,4), fill), k).flatten().tolist()==[True]*k+[False]*(12-k)

def test_top_k_ties_at_size(n=5000):
    "Sizes at which `topk` changes its algorithm"
    t = torch.randint(4, (n,)).float()
    for k in (1, n//3, n-1): assert set(top_k_mask(t, k).nonzero().flatten().tolist())==reference.top_k(t.tolist(), k)

def test_top_k_ranks_nan_last(nan=math.nan, inf=math.inf):
    assert top_k_mask(torch.tensor([nan, 1., -5., nan, 0.]), 3).tolist()==[False,True,True,False,True]
    assert top_k_mask(torch.tensor([nan, 1., -5., nan, 0.]), 4).tolist()==[True,True,True,False,True]
    assert top_k_mask(torch.tensor([nan, inf, -5.]), 1).tolist()==[False,True,False]

def test_top_k_ranks_nan_behind_minus_infinity():
    assert top_k_mask(torch.tensor([math.nan, -math.inf, 1.]), 2).tolist()==[False,True,True]

@given(st.data(), st.lists(st.sampled_from([0., 1., 2., -1., math.nan, math.inf, -math.inf]), min_size=1, max_size=60), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_top_k_in_pieces_is_top_k_of_the_whole(data, scores, dtype):
    t,among = torch.tensor(scores, dtype=dtype), torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    k,size = data.draw(st.integers(0, int(among.sum()))), data.draw(st.integers(1, len(scores)))
    want = top_k_mask(t, k, among=among)
    for n in (None, int(among.sum())): assert top_k_mask(t.split(size), k, among, n).equal(want)

@pytest.mark.parametrize('n', [0, 1, 7, 60])
@pytest.mark.parametrize('in_pieces', [False, True])
def test_top_k_beside_what_is_kept(n, in_pieces):
    "The same as selecting among all others; pieces fill the tensor that holds what is kept"
    g = torch.Generator().manual_seed(n)
    t,kept = torch.randn(8, 16, generator=g).round(decimals=1),torch.rand(8, 16, generator=g)<.3
    expect = kept|top_k_mask(t, n, among=~kept)
    got = top_k_mask(t.flatten().split(11) if in_pieces else t, n, kept=kept)
    assert (got is kept)==in_pieces and torch.equal(got, expect)
    before = kept.clone()
    with pytest.raises(ValueError, match='number of candidates'): top_k_mask(t.flatten().split(11) if in_pieces else t, 129, kept=kept)
    assert torch.equal(kept, before)

def test_top_k_in_pieces_at_size():
    "Random scores, ties, and scores that rise or fall from piece to piece"
    g = torch.Generator().manual_seed(0)
    for t in (torch.randn(300_000, generator=g), torch.randint(50, (300_000,), generator=g).float(), torch.arange(300_000.), -torch.arange(300_000.)):
        among = torch.rand(len(t), generator=g)<.9
        for k in (1, 700, 40_000, 200_000): assert top_k_mask(t.split(70_001), k, among).equal(top_k_mask(t, k, among=among))

def test_top_k_in_pieces_ranks_nan_last(nan=math.nan):
    for t in ([nan, 1.], [nan, 1., 2.], [1., nan, nan, 2.], [nan, nan, nan]):
        t = torch.tensor(t)
        for k in range(len(t)+1): assert top_k_mask(t.split(1), k, torch.ones(len(t), dtype=torch.bool)).equal(top_k_mask(t, k))

@pytest.mark.parametrize('k', [-1, 3])
def test_top_k_in_pieces_refuses_what_is_not_there(k):
    with pytest.raises(ValueError, match=f'from 0 to the number of candidates, 2, got {k}'): top_k_mask(torch.rand(4).split(2), k, torch.tensor([True, False, True, False]))

def test_top_k_non_contiguous():
    t = torch.randn(6,5).T
    assert torch.equal(top_k_mask(t, 7), top_k_mask(t.contiguous(), 7))
    assert torch.equal(top_k_mask(t[::2,1:4], 4), top_k_mask(t[::2,1:4].contiguous(), 4))
    among = (torch.arange(30).view(6,5)%2==0).T
    assert torch.equal(top_k_mask(t, 7, among=among), top_k_mask(t.contiguous(), 7, among=among.contiguous()))

def test_top_k_leaves_its_input_alone():
    t = nn.Parameter(torch.tensor([1., math.nan, 3.]))
    mask = top_k_mask(t, 2)
    assert not mask.requires_grad and t[1].isnan() and t.grad is None

# ------------------------------------------------------------ the naming convention
def mask_of(*ones, shape): return torch.zeros(shape, dtype=torch.bool).flatten().index_fill(0, torch.tensor(ones), True).view(shape)

def test_maybe_float():
    assert (maybe_float(3), maybe_float('0.5'), maybe_float(torch.tensor(.25))) == (3., .5, .25)
    assert isinstance(maybe_float(3), float) and maybe_float(None) is None and maybe_float('uniform')=='uniform'
    two,huge,nowhere = torch.ones(2),10**400,torch.ones((), device='meta')               # no number, too large for one, without a value
    assert maybe_float(two) is two and maybe_float(huge) is huge and maybe_float(nowhere) is nowhere

def test_sparse_params_in_order_of_named_parameters():
    model = nn.Sequential(nn.Linear(2,3), nn.Sequential(nn.Conv2d(3,2,1), nn.LSTM(2,2)), nn.Linear(3,2))
    for name in reversed([n for n,_ in model.named_parameters()]):
        owner,n = model.get_submodule(name.rpartition('.')[0]), name.rpartition('.')[2]
        owner.register_buffer(f'{n}_mask', torch.ones_like(getattr(owner, n), dtype=torch.bool))
    model[0].register_buffer('weight_sparsity', torch.tensor(.5))
    found = sparse_params(model)
    assert [id(p) for p,*_ in found]==[id(p) for p in model.parameters()]
    assert found[0][2]==.5 and isinstance(found[0][2], float) and all(s is None for *_,s in found[1:])

def test_sparse_params_of_one_layer_with_bias_mask():
    m = nn.Linear(3,2)
    m.register_buffer('bias_mask', torch.tensor([True,False]))
    (p,mask,s), = sparse_params(m)
    assert p is m.bias and mask is m.bias_mask and s is None and sparse_params(nn.Linear(3,2))==[]

def test_tied_parameters_are_listed_once():
    a,b = nn.Linear(3,3),nn.Linear(3,3)
    b.weight = a.weight
    for m in (a,b): m.register_buffer('weight_mask', mask_of(0,4, shape=(3,3)))
    assert len(sparse_params(nn.Sequential(a, b, a)))==1

def test_missing_parameter_and_stray_buffers_are_no_masks():
    m = nn.Linear(3,2, bias=False)
    m.register_buffer('bias_mask', torch.ones(2, dtype=torch.bool))
    m.register_buffer('other_mask', torch.ones(2, dtype=torch.bool))
    m.register_buffer('weight_mask', None)
    assert sparse_params(m)==[]

@pytest.mark.parametrize('inplace', [True,False])
def test_apply_masks(inplace):
    model = mlp(4,5,2)
    model[0].register_buffer('weight_mask', mask_of(1,7,12, shape=(5,4)))
    model[0].register_buffer('bias_mask', mask_of(2, shape=5))
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n,p in model.named_parameters()}
    apply_masks(model, inplace=inplace)
    for n,p in model.named_parameters():
        was,ptr,old = before[n]
        mask = getattr(model[0], n[2:]+'_mask') if n[0]=='0' else torch.ones_like(p, dtype=torch.bool)
        assert p is was and p.requires_grad and p.grad_fn is None and torch.equal(p, old*mask)
        assert (p.data_ptr()==ptr)==(inplace or n[0]!='0')

def test_apply_masks_not_in_place_leaves_the_old_data():
    m = nn.Linear(3,3)
    m.register_buffer('weight_mask', mask_of(4, shape=(3,3)))
    old,copy = m.weight.data,m.weight.data.clone()
    apply_masks(m, inplace=False)
    assert torch.equal(old, copy) and m.weight.count_nonzero()==1

@pytest.mark.parametrize('junk', [7., math.inf, math.nan], ids=str)
def test_apply_masks_as_pre_hook(junk):
    m = nn.Linear(3,3)
    m.register_buffer('weight_mask', mask_of(0,4,8, shape=(3,3)))
    m.register_forward_pre_hook(apply_masks)
    with torch.no_grad(): m.weight[0,1] = junk
    y = m(torch.ones(1,3))
    assert m.weight[0,1]==0 and y.isfinite().all()
    y.sum().backward()
    assert m.weight.grad.count_nonzero()==9                                              # the gradient stays dense

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_apply_masks_keeps_dtype(dtype):
    m = nn.Linear(4,4, dtype=dtype)
    m.register_buffer('weight_mask', mask_of(0,5, shape=(4,4)))
    for inplace in (True,False):
        apply_masks(m, inplace=inplace)
        assert m.weight.dtype==dtype and m.weight.count_nonzero()==2

# ------------------------------------------------------------ which modules
YES = [nn.Linear(2,2), nn.Conv1d(2,2,1), nn.Conv2d(2,2,1), nn.Conv3d(2,2,1), nn.ConvTranspose1d(2,2,1), nn.ConvTranspose2d(2,2,1), nn.ConvTranspose3d(2,2,1)]
NO  = [nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Embedding(2,2), nn.LSTM(2,2), nn.ReLU(), nn.Sequential(nn.Linear(2,2))]

@pytest.mark.parametrize('m,yes', [(m,True) for m in YES]+[(m,False) for m in NO], ids=lambda o: type(o).__name__)
def test_is_sparseable_module(m, yes): assert is_sparseable_module(m) is yes

def test_sparseable_modules_in_order_in_any_container():
    a,b,c,d,e = nn.Linear(2,2),nn.Conv2d(2,2,1),nn.ConvTranspose2d(2,2,1),nn.Embedding(3,2),nn.Linear(2,2)
    model = nn.Sequential(nn.ModuleDict(dict(x=nn.ModuleList([a, nn.ReLU()]), y=nn.Sequential(nn.Sequential(b), nn.BatchNorm2d(2)))), d, c, e, a)
    same = lambda found, *expected: [id(m) for m in found]==[id(m) for m in expected]
    assert same(sparseable_modules(model), a, b, c, e)
    assert same(sparseable_modules(model, additional_types=[nn.Embedding, nn.BatchNorm2d]), a, b, model[0]['y'][1], d, c, e)
    assert same(sparseable_modules(model), a, b, c, e)                                   # nothing remembered
    assert same(sparseable_modules(a), a) and sparseable_modules(nn.ReLU())==[]
    assert is_sparseable_module(d, additional_types=[nn.Embedding]) and not is_sparseable_module(d)

def test_subclasses_are_sparseable():
    class Mine(nn.Linear): pass
    assert is_sparseable_module(Mine(2,2)) and [type(m) for m in sparseable_modules(nn.MultiheadAttention(4,2))]==[type(nn.MultiheadAttention(4,2).out_proj)]

# ------------------------------------------------------------ masks that vanish
def net():
    torch.manual_seed(0)
    return mlp(8, 24, 20, 3)

def method(**kwargs): return DSTMethod(**{**RigL_presets, 'batches_per_update': 10, **kwargs})

def steps(model, opt, at, f, m=None, total=30):
    "A training in which `f` happens after step `at`"
    plain_loop(model, opt, m or method(), total, lambda step: f() if step==at else None)

def swap(model): model[2] = nn.Linear(24, 20)
def weight_norm(model): torch.nn.utils.parametrizations.weight_norm(model[2])
def prune_and_remove(model):
    from torch.nn.utils import prune
    prune.l1_unstructured(model[2], 'weight', .1); prune.remove(model[2], 'weight')
def qat(model):
    "As torch's own conversion does it for some layers"
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import get_default_qat_qconfig
    model[2].qconfig = get_default_qat_qconfig('x86')
    model[2] = Linear.from_float(model[2])
def resize(model):
    "A head with more outputs in the old one's place, as `resize_token_embeddings` makes"
    old,model[4] = model[4],nn.Linear(20, 3)
    model[4].weight.data.copy_(old.weight)

VANISHING = dict(swap=(swap, '2'), weight_norm=(weight_norm, '2'), prune=(prune_and_remove, '2'), qat=(qat, '2'), resize=(resize, '4'))
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how,layer', VANISHING.values(), ids=VANISHING)
def test_a_vanished_mask_is_an_error(how, layer):
    "In the middle of a training, before it, and in a file of the whole model; the doctor sees it; the others are untouched"
    model = net()
    sparsify_model(model, .6)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    with pytest.raises(ValueError, match=f'{layer}.weight: .*(add_mask|unsparsify_model)'): steps(model, opt, 7, lambda: how(model))
    model = net()
    sparsify_model(model, .6)
    how(model)
    model = pickle.loads(pickle.dumps(model)) if how in (swap, resize) else model
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    for f in (lambda: method().check(model, opt), lambda: attach(method(), model, opt, 30), lambda: method().step(model, opt, 1, total=30)):
        with pytest.raises(ValueError, match='weight'): f()
    found = [f for f in sparse_doctor(model) if f.severity=='fault']
    assert {f.kind for f in found}<={'lost mask', 'orphan'} and any(layer in f.where for f in found)

def all_deleted(model):
    for i in (0, 2, 4): del model[i].weight_mask
def all_swapped(model):
    for i in (0, 2, 4): model[i] = nn.Linear(model[i].in_features, model[i].out_features)
def all_normed(model):
    for i in (0, 2, 4): torch.nn.utils.parametrizations.weight_norm(model[i])
@pytest.mark.parametrize('how', [all_deleted, all_swapped, all_normed], ids=lambda f: f.__name__)
def test_all_masks_at_once(how):
    "Named like one: in a loop, attached, and before a training; a model that never had masks gets the general word"
    def made():
        sparsify_model(model := net(), .6)
        return model,torch.optim.SGD(model.parameters(), lr=.01)
    named = r'^0.weight: |`weight` of .*: (its|there)'
    todo = '.*(add_mask|unsparsify_model)'
    model,opt = made()
    with pytest.raises(ValueError, match=f'({named}){todo}'): steps(model, opt, 7, lambda: how(model))
    model,opt = made()
    attached = attach(method(), model, opt, 30)
    how(model)
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match=f'({named}){todo}'): opt.step()
    attached.remove()
    for f in (method().check, lambda *a: method().update(*a, 10, total=30), lambda *a: method().step(*a, 1, total=30)):
        with pytest.raises(ValueError, match=f'({named}){todo}'): f(model, opt)
    with pytest.raises(ValueError, match='model must have a mask to train with, got none'): method().step(unsparsify_model(made()[0]), opt, 2, total=30)

def test_the_way_out_is_to_say_so():
    model = net()
    sparsify_model(model, .6)
    swap(model)
    enforce_masks(model)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    plain_loop(model, opt, method(), 20)
    assert len(sparse_params(model))==2 and sparse_doctor(model).healthy
    swap(model)
    add_mask(model[2], 'weight', torch.rand(20,24)<.4)
    assert not lost_masks(model)

def compressed(model): to_sparse_layers(model, least=0.)
def there_and_back(model): to_sparse_layers(model, least=0.); to_masked_layers(model)
def part_dense(model): unsparsify_model(model[2])
def by_hand(model): del model[2].weight_mask, model[2].weight_sparsity; enforce_masks(model)
def wrapped(model): model[2] = nn.Sequential(model[2])
def compiled(model): model[2] = torch.compile(model[2])
def shrunk(model): add_mask(model[0], 'weight', torch.rand(24,8)<(torch.arange(24)>3)[:,None]); shrink_model(model, torch.randn(4,8))
def loaded(model): load_sparse_state(model, copy.deepcopy(model.state_dict()))
def copied(model): return copy.deepcopy(model)
def inside(model): return nn.Sequential(model, nn.Linear(3,3))
def again(model): unsparsify_model(model); sparsify_model(model, .5, exclude=2, keep='random')
@pytest.mark.parametrize('how', [compressed, there_and_back, part_dense, by_hand, wrapped, compiled, shrunk, loaded, copied, inside, again], ids=lambda f: f.__name__)
def test_what_is_no_loss(how):
    "Our own conversions, wrappers, copies, and masks taken off on purpose"
    model = net()
    sparsify_model(model, .6)
    model = how(model) or model
    assert lost_masks(model)==[]
    method().check(model, torch.optim.SGD(model.parameters(), lr=.01), 30)

def test_a_deliberate_removal_does_not_hide_a_loss():
    model = net()
    sparsify_model(model, .6)
    unsparsify_model(model[0]); swap(model)
    assert lost_masks(model)==['2.weight'] and lost_masks(nn.Sequential(model))==['0.2.weight']
    add_mask(model[0], 'weight', torch.rand(24,8)<.4)
    enforce_masks(model)
    prune_and_remove(model[:1].append(nn.Identity()).append(model[0]))
    assert lost_masks(model)==['0.weight']

def test_a_replaced_parameter_is_named():
    model = net()
    sparsify_model(model, .6)
    model[4].weight,model[4].bias = nn.Parameter(torch.randn(5,20)),nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"`weight_mask` of '4' must be boolean with shape \(5, 20\).*replaced.*add_mask"): model(torch.randn(2,8))
    assert 'add_mask' in next(f.todo for f in sparse_doctor(model) if f.kind=='shape')
    add_mask(model[4], 'weight', torch.rand(5,20)<.4)
    assert model(torch.randn(2,8)).shape==(2,5) and sparse_doctor(model).healthy

# ------------------------------------------------------------ layers that the optimizer does not know
def told(f):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in got if 'does not know' in str(w.message)]

def new_masked_head(model):
    old,model[4] = model[4],nn.Linear(20, 3)
    add_mask(model[4], 'weight', old.weight_mask)

@pytest.mark.parametrize('how', [compressed, new_masked_head], ids=lambda f: f.__name__)
@pytest.mark.parametrize('at', [1, 7])
def test_layers_forgotten_by_the_optimizer_are_warned_of_once(how, at):
    "At any step; again for another optimizer; not if the optimizer has been told"
    model,m = net(),method(initial_drop_grow_pct=0.)
    sparsify_model(model, .6)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    assert len(told(lambda: steps(model, opt, at, lambda: how(model), m)))==1
    assert told(lambda: steps(model, torch.optim.SGD(model.parameters(), lr=.01), at, lambda: None, m))==[]
    model = net()
    sparsify_model(model, .6)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    assert told(lambda: steps(model, opt, at, lambda: to_sparse_layers(model, opt, least=0.), m))==[]

def test_a_new_dense_head_that_the_optimizer_does_not_know():
    model = net()
    sparsify_model(model, .6, exclude='4')
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    def head(): model[4] = nn.Linear(20, 3)
    message, = told(lambda: steps(model, opt, 7, head))
    assert message.startswith('4.weight') and '1 more' in message
    assert told(lambda: steps(model, torch.optim.SGD(model[:4].parameters(), lr=.01), 0, head))==[]     # two optimizers, say: nothing was replaced

def test_the_message_of_a_gradient_that_is_never_zeroed():
    model = net()
    sparsify_model(model, .6)
    opt = torch.optim.SGD(model.parameters(), lr=.01)
    with pytest.warns(UserWarning, match='does not know'), pytest.raises(ValueError, match=r'never zeroed: convert by `to_sparse_layers\(model, opt\)`'):
        for step,(x,y) in enumerate(batches(30), 1):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            method().step(model, opt, step, total=30)
            opt.zero_grad()
            if step==7: to_sparse_layers(model, least=0.)
