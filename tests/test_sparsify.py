"From dense to sparse and back: masks, hooks, copies, files"
import copy, io, pickle, warnings
from functools import partial
import pytest, torch, torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn
from helpers import changed, learner, masked_are_zero, masks, mlp, nnz, same_masks, snapshot
from fastai.callback.hook import Hooks
from sparsefast.cautions import *
from sparsefast.distributions import *
from sparsefast.masks import masked_params, sparse_params, top_k_mask
from sparsefast.memory import memory
from sparsefast.patterns import follows, nm_pattern
from sparsefast.scores import weight_magnitude
from sparsefast.guard import *
from sparsefast.select import weight_names
from sparsefast.sparsify import *
from sparsefast.storage import to_masked_layers, to_sparse_layers

def revive(model):
    "Write into every masked weight from outside"
    with torch.no_grad():
        for *_,p,mask in masked_params(model): p[~mask] = 9.

def n_hooks(model): return sum(len(m._forward_pre_hooks) for m in model.modules())

def convnet():
    return nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,4))

# ------------------------------------------------------------ masks and targets
@given(st.lists(st.integers(1, 9), min_size=3, max_size=5), st.floats(0.01, .9), st.sampled_from([uniform_sparsity, erdos_renyi_sparsity]))
@pytest.mark.filterwarnings('ignore:a layer of')
def test_counts_and_targets(sizes, S, sparse_f):
    model = mlp(*sizes)
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    expected = [(id(p),s) for p,s in zip(weights, sparse_f(weights, S)) if s]
    sparsify_model(model, S, sparse_f)
    found = sparse_params(model)
    assert [id(p) for p,*_ in found]==[i for i,_ in expected]
    for (p,mask,target),(_,s) in zip(found, expected):
        assert target==pytest.approx(s, rel=1e-6) and int(mask.sum())==round((1-s)*p.numel()) and (p[~mask]==0).all()

def test_buffers_beside_the_weight():
    model = convnet()
    dense = copy.deepcopy(model)
    sparsify_model(model, .75, first_layer_dense_uniform)
    assert {n for n,_ in model.named_buffers()}-{n for n,_ in dense.named_buffers()}=={f'{i}.weight_{b}' for i in (3,7) for b in ('mask','sparsity')}
    assert nnz(model)==[288,16] and torch.equal(model[0].weight, dense[0].weight)        # sparsity 0: no mask, nothing changed
    for i in (3,7): assert torch.equal(model[i].weight, dense[i].weight*model[i].weight_mask)
    assert not changed({k: v for k,v in snapshot(model).items() if 'mask' not in k and 'sparsity' not in k and 'weight' not in k},
                       {k: v for k,v in snapshot(dense).items() if 'weight' not in k})

def test_parameters_keep_their_identity():
    model = mlp(6,5,4)
    opt = torch.optim.SGD(model.parameters(), lr=1)
    ids = [id(p) for p in model.parameters()]
    sparsify_model(model, .5)
    assert ids==[id(p) for p in model.parameters()]==[id(p) for p in opt.param_groups[0]['params']]

def test_seeds():
    draw = lambda seed: (m := mlp(9,8,7), torch.manual_seed(seed), sparsify_model(m, .5), masks(m))[-1]
    assert same_masks(draw(1), draw(1)) and not same_masks(draw(1), draw(2))

def test_identical_layers_get_different_masks():
    model = mlp(20,20,20)
    sparsify_model(model, .5)
    assert not torch.equal(*masks(model))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype(dtype):
    def make(dt):
        model = mlp(8,6,4, dtype=dt)
        torch.manual_seed(2)
        sparsify_model(model, .6)
        return model
    model = make(dtype)
    y = model(torch.randn(2,8, dtype=dtype))
    assert y.dtype==dtype and all(p.dtype==dtype for p in model.parameters()) and all(m.dtype==torch.bool for m in masks(model))
    assert same_masks(masks(model), masks(make(torch.float32)))                          # and the same masks for the same seed
    model.float(); model.half()
    assert all(m.dtype==torch.bool for m in masks(model)) and nnz(model)==[19,10]

def test_custom_distribution_sees_weights_in_order():
    model,seen = convnet(),[]
    def half_then_none(params, model_sparsity):
        seen.extend(id(p) for p in params)
        return [torch.tensor(.5), 0, model_sparsity]
    sparsify_model(model, .25, half_then_none)
    assert seen==[id(model[i].weight) for i in (0,3,7)] and nnz(model)==[108,48]

def test_additional_types():
    model = nn.Sequential(nn.Embedding(10,4), nn.Flatten(), nn.Linear(8,2))
    sparsify_model(model, .5, additional_types=[nn.Embedding])
    assert nnz(model)==[20,8]
    revive(model)
    model(torch.zeros(1,2, dtype=torch.long))
    assert masked_are_zero(model)

def test_learner_is_accepted():
    learn = learner(mlp(8,6,3))
    hooks = sparsify_model(learn, .5)
    assert isinstance(hooks, Hooks) and nnz(learn.model)==[24,9] and unsparsify_model(learn) is learn.model and nnz(learn.model)==[]

def test_empty_layer_warns():
    with pytest.warns(UserWarning, match='none of 4 weights is active'): sparsify_model(nn.Linear(2,2), .9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify_model(nn.Linear(2,2), 1.)                                               # asked for

# ------------------------------------------------------------ hooks
def test_hooks_enforce_until_removed():
    model = mlp(5,6,3)
    hooks = sparsify_model(model, .5)
    assert isinstance(hooks, Hooks) and n_hooks(model)==3           # one on each layer, one on the model
    revive(model)
    y = model(torch.ones(1,5))
    assert masked_are_zero(model) and torch.equal(y, model(torch.ones(1,5)))
    hooks.remove()
    revive(model)
    assert n_hooks(model)==0 and not torch.equal(y, model(torch.ones(1,5))) and not masked_are_zero(model) and nnz(model)==[15,9]

def test_no_hooks_wanted():
    model = mlp(5,6,3)
    hooks = sparsify_model(model, .5, enforce_mask=False)
    assert isinstance(hooks, Hooks) and n_hooks(model)==0 and masked_are_zero(model)
    hooks.remove()

def test_hooks_as_context():
    model = mlp(5,6,3)
    with sparsify_model(model, .5): assert n_hooks(model)==3
    assert n_hooks(model)==0 and nnz(model)==[15,9]

def test_enforce_masks_replaces_its_own_hooks_only():
    model,calls = mlp(5,6,3),[]
    model[0].register_forward_pre_hook(lambda m, x: calls.append(1))
    sparsify_model(model, .5)
    enforce_masks(model)
    assert n_hooks(model)==4
    unsparsify_model(model)(torch.ones(1,5))
    assert n_hooks(model)==1 and calls==[1]

# ------------------------------------------------------------ attention: the parent uses the weight of out_proj directly
def attention_output(model, x):
    y = model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)
    return y[0] if isinstance(y, tuple) else y

@pytest.mark.parametrize('train', [True,False], ids=['train','eval'])
@pytest.mark.parametrize('grad', [True,False], ids=['grad','no_grad'])
@pytest.mark.parametrize('make', [partial(nn.MultiheadAttention, 8, 2), partial(nn.MultiheadAttention, 8, 2, batch_first=True),
    partial(nn.TransformerEncoderLayer, 8, 2, 16, 0., batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0., batch_first=True), 2)], ids=['mha','mha batch_first','layer','encoder'])
def test_attention_leaks_nothing(make, train, grad):
    model = make().train(train)
    sparsify_model(model, .5)
    x = torch.randn(2,3,8)
    with torch.set_grad_enabled(grad):
        clean = attention_output(model, x)
        revive(model)
        assert torch.equal(attention_output(model, x), clean) and masked_are_zero(model)

def test_attention_mask_of_in_proj():
    mha = nn.MultiheadAttention(8, 2).eval()
    add_mask(mha, 'in_proj_weight', torch.arange(24*8).view(24,8)%3==0)
    enforce_masks(mha)
    x = torch.randn(3,2,8)
    clean = attention_output(mha, x)
    revive(mha)
    assert torch.equal(attention_output(mha, x), clean) and 'in_proj_weight_mask' in mha.state_dict()

# ------------------------------------------------------------ tied weights
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc,self.mid,self.dec = nn.Linear(6,4, bias=False),nn.Linear(4,6),nn.Linear(6,4, bias=False)
        self.dec.weight = self.enc.weight
    def forward(self, x): return self.dec(self.mid(self.enc(x)))

def test_tied_weights_share_one_mask():
    model = Tied()
    sparsify_model(model, .5)
    assert len(sparse_params(model))==2 and nnz(model)==[12,12] and 'enc.weight_mask' in model.state_dict()
    revive(model)
    model.dec(torch.ones(1,6))                                                           # reached through the other module
    assert (model.enc.weight[~model.enc.weight_mask]==0).all()

def test_tied_weights_keep_the_order():
    model,seen = Tied(),[]
    sparsify_model(model, .5, lambda params, s: [seen.append(id(p)) or s for p in params])
    assert seen==[id(model.enc.weight), id(model.mid.weight)]

def test_embedding_tied_to_the_head():
    emb,head = nn.Embedding(10,4),nn.Linear(4,10, bias=False)
    head.weight = emb.weight
    model = nn.Sequential(emb, head)
    sparsify_model(model, .5)
    ids = torch.arange(10)
    clean = emb(ids).clone()
    revive(model)
    assert torch.equal(emb(ids), clean)

def test_shared_module_is_one_layer():
    lin = nn.Linear(4,4)
    model = nn.Sequential(lin, nn.ReLU(), lin)
    sparsify_model(model, .5)
    assert nnz(model)==[8]

# ------------------------------------------------------------ copies and files
@pytest.mark.parametrize('dup', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
@pytest.mark.parametrize('make', [lambda: mlp(6,5,4,6), Tied, lambda: nn.MultiheadAttention(6, 2)], ids=['mlp','tied','attention'])
def test_copies_enforce_on_themselves(make, dup):
    model = make()
    sparsify_model(model, .5)
    twin,x = dup(model),torch.randn(3,6)
    assert same_masks(masks(model), masks(twin)) and n_hooks(twin)==n_hooks(model)
    clean,before = attention_output(twin, x),snapshot(model)
    revive(twin)
    assert torch.equal(attention_output(twin, x), clean) and masked_are_zero(twin) and not changed(before, snapshot(model))
    unsparsify_model(twin)
    assert n_hooks(twin)==0 and n_hooks(model)>0 and not changed(before, snapshot(model))

def test_state_dict_round_trip():
    model,other = convnet(),convnet()
    sparsify_model(model, .75); sparsify_model(other, .5)
    buf = io.BytesIO()
    torch.save(model.state_dict(), buf)
    buf.seek(0)
    other.load_state_dict(torch.load(buf, weights_only=True))
    assert not changed(snapshot(model), snapshot(other)) and masked_are_zero(other)
    revive(other)
    x = torch.randn(2,3,8,8)
    assert torch.equal(other.eval()(x), model.eval()(x))                                 # the hooks follow the loaded masks

def test_moving_keeps_parameters_and_masks_together():
    model = mlp(4,3)
    sparsify_model(model, .5)
    assert all(p.device==m.device for *_,p,m in masked_params(model.to('meta')))

# ------------------------------------------------------------ and back
def test_unsparsify():
    model = convnet()
    keys = list(model.state_dict())
    sparsify_model(model, .75, erdos_renyi_sparsity)
    zeros = {n: p==0 for n,p in model.named_parameters()}
    revive(model)
    assert unsparsify_model(model) is model
    assert list(model.state_dict())==keys and n_hooks(model)==0 and sparse_params(model)==[]
    assert all(torch.equal(p==0, zeros[n]) for n,p in model.named_parameters())          # the zeros are baked in
    sparsify_model(model, .5)
    assert nnz(model)==[108,576,32]

def test_unsparsify_a_dense_model_does_nothing():
    model = mlp(3,2)
    before = snapshot(model)
    assert not changed(before, snapshot(unsparsify_model(model)))

# ------------------------------------------------------------ add_mask
def test_add_mask():
    m = nn.Linear(3,2)
    add_mask(m, 'bias', torch.tensor([True,False]))
    assert m.bias[1]==0 and m.bias_sparsity==.5 and isinstance(m.bias, nn.Parameter)
    add_mask(m, 'weight', torch.ones(2,3, dtype=torch.bool), sparsity=.25)
    assert m.weight_sparsity==.25

# ------------------------------------------------------------ which layers, how sparse
def refused_untouched(model, match, *args, **kwargs):
    before,hooks,buffers = snapshot(model),n_hooks(model),sorted(n for n,_ in model.named_buffers())
    with pytest.raises(ValueError, match=match): sparsify_model(model, *args, **kwargs)
    assert not changed(before, snapshot(model)) and n_hooks(model)==hooks and sorted(n for n,_ in model.named_buffers())==buffers

def sparsity_of(*modules):
    n = sum(m.weight.numel() for m in modules)
    return 1-sum(int(m.weight_mask.sum()) if 'weight_mask' in m._buffers else m.weight.numel() for m in modules)/n

def test_excluded_layers_are_dense_and_not_counted():
    model = convnet()
    sparsify_model(model, .75, erdos_renyi_sparsity, exclude=[0, nn.Linear])
    assert not hasattr(model[0], 'weight_mask') and not hasattr(model[7], 'weight_mask') and sparsity_of(model[3])==pytest.approx(.75, abs=1e-3)

def test_a_tied_weight_is_excluded_by_either_name():
    for which in (0, 1):
        model = nn.Sequential(nn.Linear(6,6), nn.Linear(6,6), nn.Linear(6,6))
        model[1].weight = model[0].weight
        sparsify_model(model, .5, exclude=which)
        assert [hasattr(m, 'weight_mask') for m in model]==[False, False, True]

def test_nothing_left_after_exclusion(): refused_untouched(mlp(4,4), r"every layer.*is excluded by '\*'", .5, exclude='*')

@given(st.lists(st.tuples(st.integers(2, 12), st.booleans(), st.floats(0, 1)), min_size=2, max_size=6), st.floats(.05, .95), st.sampled_from([uniform_sparsity, erdos_renyi_sparsity]))
@pytest.mark.filterwarnings('ignore:a layer of')
def test_the_rest_meets_the_total(layers, S, sparse_f):
    "Whatever layers are fixed: they are exact, and the total is met to a weight a layer, or refused with the range that could be"
    model = mlp(6, *[n for n,*_ in layers])
    linear = [m for m in model if isinstance(m, nn.Linear)]
    fixed = {f'{2*i}': s for i,(_,fix,s) in enumerate(layers) if fix}
    numel = [m.weight.numel() for m in linear]
    zeros = sum(fixed.get(f'{2*i}', 0)*n for i,n in enumerate(numel))
    low,high = zeros/sum(numel),(zeros+sum(n for i,n in enumerate(numel) if f'{2*i}' not in fixed))/sum(numel)
    slack = (len(linear)/2+1)/sum(numel)
    if low+slack<S<high-slack:
        sparsify_model(model, S, sparse_f, sparsities=fixed)
        for i,n in enumerate(numel):
            if f'{2*i}' in fixed: assert n-round((1-fixed[f'{2*i}'])*n)==round(sparsity_of(linear[i])*n)
        assert abs(sparsity_of(*linear)-S)*sum(numel)<=len(linear)*(2 if sparse_f is erdos_renyi_sparsity else 1)
    elif not low-slack<=S<=high+slack: refused_untouched(model, 'model_sparsity must be from', S, sparse_f, sparsities=fixed)

def test_two_sparsities_for_a_layer(): refused_untouched(mlp(4,4,4), "'0' stands for has two sparsities, 0.5 and 0.6", .5, sparsities={nn.Linear: .5, '0': .6})
def test_a_sparsity_that_is_none(): refused_untouched(mlp(4,4,4), "the sparsity of '0' must be a number from 0 to 1, got 95", .5, sparsities={'0': 95})
def test_excluded_and_fixed(): refused_untouched(mlp(4,4,4), 'excluded and given a sparsity', .5, exclude=0, sparsities={0: .5})
def test_misspelt_name_lists_near_ones(): refused_untouched(convnet(), r"is '77'; there are 3, 0 to 2: '7'", .5, exclude='77')

def test_own_masks():
    torch.manual_seed(0)
    model,mine = mlp(4,6,4),torch.rand(6,4)>.75
    sparsify_model(model, .5, masks={0: mine})
    assert torch.equal(model[0].weight_mask, mine) and model[0].weight_sparsity==pytest.approx(1-mine.float().mean().item())
    assert abs(sparsity_of(model[0], model[2])-.5)<=1/48 and masked_are_zero(model)

def test_all_masks_given():
    model = mlp(4,6,4)
    mine = {0: torch.rand(6,4)>.5, 1: torch.rand(4,6)>.5}
    S = sum(int((~m).sum()) for m in mine.values())/48
    sparsify_model(model, S, masks=mine)
    assert same_masks(masks(model), list(mine.values()))
    refused_untouched(mlp(4,6,4), f'model_sparsity must be from {S:.4f} to {S:.4f}.*got 0.99', .99, masks=mine)

@pytest.mark.parametrize('mask,match', [(torch.ones(6,4), 'boolean.*float32'), (torch.ones(4,6, dtype=torch.bool), r'shape \(6, 4\).*shape \(4, 6\)'), ('yes', "boolean.*str")])
def test_own_mask_refused(mask, match): refused_untouched(mlp(4,6,4), match, .5, masks={0: mask})
def test_own_mask_is_for_one_layer(): refused_untouched(mlp(4,6,4), '2 weights, and a mask is for one', .5, masks={'*': torch.ones(6,4, dtype=torch.bool)})

def test_own_mask_of_all_ones_is_kept():
    model = mlp(4,6,4)
    sparsify_model(model, .25, masks={0: torch.ones(6,4, dtype=torch.bool)})
    assert model[0].weight_mask.all() and sparsity_of(model[2])==.5

def test_initial_sparsity():
    for s0,count in ((0., [24,24]), (.25, [18,18])):
        model = mlp(4,6,4)
        sparsify_model(model, .5, initial_sparsity=s0)
        assert nnz(model)==count and all(t==.5 for *_,t in sparse_params(model)) and masked_are_zero(model)
    refused_untouched(mlp(4,6,4), 'initial_sparsity must be at most model_sparsity, 0.5, got 0.6', .5, initial_sparsity=.6)
    refused_untouched(mlp(4,6,4), 'initial_sparsity must be a number from 0 to 1', .5, initial_sparsity=-1)

def test_initial_sparsity_and_fixed_layers():
    model = mlp(10,10,10)
    sparsify_model(model, .6, sparsities={0: .2}, initial_sparsity=.4)
    assert nnz(model)==[80, 60] and [round(t, 4) for *_,t in sparse_params(model)]==[.2, 1.]

def test_masks_by_score():
    torch.manual_seed(0)
    model = mlp(8,8,8)
    dense = copy.deepcopy(model)
    sparsify_model(model, .75, score_f=weight_magnitude)
    for a,b in zip((model[0], model[2]), (dense[0], dense[2])):
        assert torch.equal(a.weight_mask, top_k_mask(b.weight.abs(), 16)) and torch.equal(a.weight, b.weight*a.weight_mask)

def test_score_of_the_wrong_shape(): refused_untouched(mlp(4,6,4), r'must return a tensor of shape \(6, 4\)', .5, score_f=lambda p, **kw: p.abs().sum(1))

def test_pattern():
    model = mlp(8,8,4)
    sparsify_model(model, .5, pattern_f=nm_pattern)
    assert all(follows(m, nm_pattern) and m.sum()==m.numel()//2 for m in masks(model))

def test_layers_that_a_pattern_does_not_fit_are_all_named():
    refused_untouched(mlp(6,10,8,4), r"0: 2:4 needs a multiple of 4.*2: 2:4 needs.*exclude=\['0', '2'\]", .5, pattern_f=nm_pattern)
    refused_untouched(mlp(8,8,4), r'more than the pattern has room for, 32 of 64 \(use a higher sparsity, or `sparse_f=uniform_sparsity`', .3, pattern_f=nm_pattern)

def test_keep_dense():
    torch.manual_seed(0)
    model = mlp(8,8,4)
    dense = copy.deepcopy(model)
    sparsify_model(model, .5, keep_dense=True)
    for i in (0, 2):
        m = model[i]
        assert torch.equal(m.weight+m.weight_dst_store, dense[i].weight) and (m.weight_dst_store[m.weight_mask]==0).all() and (m.weight[~m.weight_mask]==0).all()
    unsparsify_model(model)
    assert list(model.state_dict())==list(dense.state_dict()) and not any(m._load_state_dict_pre_hooks for m in model.modules())

# ------------------------------------------------------------ sparse-aware initialisation
@pytest.mark.parametrize('make,transposed', [(lambda: nn.Linear(400,50), False), (lambda: nn.Conv2d(40,50,3), False), (lambda: nn.ConvTranspose2d(50,40,3), True)])
def test_sparse_init_scales_each_neuron(make, transposed):
    torch.manual_seed(0)
    layer = make()
    shape = layer.weight.shape
    row = torch.arange(shape[1 if transposed else 0])
    keep = (torch.rand(shape)<(.05+.9*row/len(row)).view([1,-1] if transposed and len(shape)==2 else [1,-1,1,1] if transposed else [-1]+[1]*(len(shape)-1)))
    sparsify_model(layer, 1-keep.float().mean().item(), masks={0: keep}, init_f=sparse_kaiming_normal_)
    w,mask = (t.movedim(1, 0).flatten(1) if transposed else t.flatten(1) for t in (layer.weight.detach(), layer.weight_mask))
    n = mask.sum(1)
    assert masked_are_zero(layer) and (n.max()>5*n.min())
    z = w.pow(2).sum(1)/2                                                                    # n terms of variance 2/n
    assert z.mean().item()==pytest.approx(1, abs=4*(2/n).mean().sqrt().item()/len(n)**.5) and abs((z-1)/(2/n).sqrt()).max()<5

def test_sparse_init_of_empty_rows():
    layer,mask = nn.Linear(4,3),torch.zeros(3,4, dtype=torch.bool)
    mask[0,0] = True
    sparsify_model(layer, 11/12, masks={0: mask}, init_f=sparse_kaiming_normal_)
    assert layer.weight.isfinite().all() and layer.weight.count_nonzero()==1

def test_dense_layers_are_not_initialised_again():
    model = mlp(8,8,4)
    before = model[2].weight.clone()
    sparsify_model(model, .5, exclude='2', init_f=sparse_kaiming_normal_)
    assert torch.equal(before, model[2].weight)

# ------------------------------------------------------------ memory in the state dict
def remembering(seed=0):
    torch.manual_seed(seed)
    model = mlp(4,6,4)
    sparsify_model(model, .5)
    return model

@pytest.mark.parametrize('copy_f', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['itself', 'deepcopy', 'pickle'])
def test_buffers_of_earlier_versions_are_adopted(copy_f):
    with_memory = remembering()
    with_memory[0].register_buffer('weight_dst_grad', torch.rand(6,4))
    with_memory[2].register_buffer('weight_dst_shared', torch.tensor(.25))
    plain = remembering(1)
    buf = io.BytesIO(); torch.save(with_memory.state_dict(), buf); buf.seek(0)
    other = copy_f(remembering(2))
    other.load_state_dict(torch.load(buf, weights_only=True))
    assert torch.equal(memory(other[0].weight)['grad'], with_memory[0].weight_dst_grad) and memory(other[2].weight)['shared']==.25
    other.load_state_dict(plain.state_dict())                       # an optimizer's state, which a model's leaves alone
    assert memory(other[2].weight) and not any('_dst_' in n for n,_ in other.named_buffers())

def test_foreign_keys_are_still_refused():
    model = remembering()
    with pytest.raises(RuntimeError, match='bias_dst_x'): model.load_state_dict({**model.state_dict(), '0.bias_dst_x': torch.zeros(1)})

# ------------------------------------------------------------ from a state dict
def from_file(model):
    "A state as it comes from a file"
    from io import BytesIO
    file = BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)

def kinds():
    torch.manual_seed(0)
    return dict(mlp=mlp(6,8,4), conv=nn.Sequential(nn.Conv2d(3,8,3), nn.BatchNorm2d(8)), attention=nn.TransformerEncoderLayer(8, 2, 8), lstm=nn.LSTM(4, 4), single=nn.Linear(6, 6))

@pytest.mark.parametrize('target', ['dense', 'same', 'other layers', 'half'])
@pytest.mark.parametrize('kind', kinds())
def test_load_sparse_state(kind, target):
    "Whatever the new model was, afterwards it is the saved one: weights, masks, targets, hooks"
    model,new = kinds()[kind],kinds()[kind]
    for p in new.parameters(): p.data.add_(1)
    sparsify_model(model, .6, initial_sparsity=.3)
    if target=='half': model,new = model.half(),new.half()
    elif target=='same': sparsify_model(new, .2)
    elif target=='other layers': sparsify_model(new, .2, exclude=-1 if kind not in ('conv', 'single') else [])
    hooks = load_sparse_state(new, from_file(model))
    a,b = snapshot(model),snapshot(new)
    assert not changed(a, b) and list(model.state_dict())==list(new.state_dict()) and n_hooks(new)==n_hooks(model)==len(hooks.hooks)-2        # two of them are a hook after the forward, and one before a state is loaded
    assert [m.dtype for m in masks(new)]==[torch.bool]*len(masks(model))

def test_masks_that_the_state_does_not_have_go():
    model,new = mlp(6,8,4),mlp(6,8,4)
    sparsify_model(model, .6, exclude=0)
    sparsify_model(new, .5)
    load_sparse_state(new, model.state_dict())
    assert len(masks(new))==1 and not hasattr(new[0], 'weight_mask') and torch.equal(new[0].weight, model[0].weight)

def test_a_dense_state_makes_a_dense_model():
    model = mlp(6,8,4)
    sparsify_model(model, .5)
    load_sparse_state(model, mlp(6,8,4).state_dict())
    assert not masks(model) and not n_hooks(model)

@pytest.mark.parametrize('other,match', [(lambda: mlp(6,9,4), "'0.weight' has shape .8, 6., and the model's .9, 6."), (lambda: mlp(6,8,4,4), "'4.bias' is missing in the state, nor are 1 others"), (lambda: mlp(6,8), "'2.bias' is not in the model")])
def test_a_state_that_does_not_fit_changes_nothing(other, match):
    model,new = mlp(6,8,4),other()
    sparsify_model(model, .6)
    sparsify_model(new, .5)
    before,hooks = snapshot(new),n_hooks(new)
    with pytest.raises(ValueError, match=f'this state does not fit Sequential: {match}'): load_sparse_state(new, model.state_dict())
    assert not changed(before, snapshot(new)) and n_hooks(new)==hooks

def test_a_mask_of_another_shape_changes_nothing():
    model,new = mlp(6,8,4),mlp(6,8,4)
    sparsify_model(model, .6)
    state = model.state_dict() | {'0.weight_mask': torch.ones(3, 3, dtype=torch.bool)}
    before = snapshot(new)
    with pytest.raises(ValueError, match="mask of '0.weight' must be boolean with shape .8, 6., got torch.bool with shape .3, 3."): load_sparse_state(new, state)
    assert not changed(before, snapshot(new))

def test_what_a_method_remembers_comes_along():
    model,new = mlp(6,8,4),mlp(6,8,4)
    sparsify_model(model, .5, keep_dense=True)
    load_sparse_state(new, model.state_dict())
    assert torch.equal(new[0].weight_dst_store, model[0].weight_dst_store)

# ------------------------------------------------------------ masks belong to one model
def test_masks_are_copied():
    "What a training changes are the model's own masks, not a saved state, nor those of the model that lent them"
    start = mlp(16, 64, 3)
    sparsify_model(start, .8)
    saved = copy.deepcopy(start.state_dict())
    lent = {n: start[int(n)].weight_mask for n in ('0', '2')}
    before = {n: m.clone() for n,m in lent.items()}
    loaded,other = mlp(16, 64, 3),mlp(16, 64, 3)
    load_sparse_state(loaded, saved)
    s = 1-sum(int(m.sum()) for m in lent.values())/sum(m.numel() for m in lent.values())
    sparsify_model(other, s, masks=lent)
    for model in (loaded, other):
        for m in (model[0], model[2]): m.weight_mask.logical_not_()
    assert all(torch.equal(before[n], lent[n]) and torch.equal(before[n], saved[f'{n}.weight_mask']) for n in lent)

def test_a_state_without_targets_is_loaded():
    "A mask needs no target"
    model,new = nn.Sequential(nn.Linear(8, 8)),nn.Sequential(nn.Linear(8, 8))
    model[0].register_buffer('weight_mask', torch.rand(8, 8)<.5)
    load_sparse_state(new, model.state_dict())
    assert torch.equal(new[0].weight_mask, model[0].weight_mask) and abs(new[0].weight_sparsity-(1-model[0].weight_mask.float().mean()))<1e-6

@pytest.mark.parametrize('name,f', dict(uniform=uniform_sparsity, erk=erdos_renyi_sparsity, ERK=erdos_renyi_sparsity, er=partial(erdos_renyi_sparsity, include_kernel=False)).items())
def test_distributions_by_name(name, f):
    a,b = convnet(),convnet()
    for m,g in ((a, name), (b, f)):
        torch.manual_seed(0)
        sparsify_model(m, .9, sparse_f=g)
    assert same_masks(masks(a), masks(b))

def test_an_unknown_distribution_is_refused():
    refused_untouched(mlp(4,6,4), "sparse_f must be a function or one of .*got 'erks': did you mean erk", .5, 'erks')

# ------------------------------------------------------------ a trained model
def told(f, *args, **kwargs):
    "Messages of the warnings of a call"
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter('always')
        f(*args, **kwargs)
    return [str(w.message) for w in got]

def trained(model, shape=(8,), steps=60, n_out=4):
    torch.manual_seed(1)
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        x = torch.randn(16, *shape)
        F.cross_entropy(model(x), x.flatten(1)[:,:n_out].argmax(1)).backward()
        opt.step(); opt.zero_grad()
    return model

class LSTM(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.head = nn.LSTM(8, 64),nn.Linear(64, 4)
    def forward(self, x): return self.head(self.rnn(x)[0])

def no_bias(): return nn.Sequential(nn.Linear(8,32, bias=False), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32,4, bias=False))
def resnet():
    from torchvision.models import resnet18
    return resnet18(num_classes=4)

TRAINED = dict(mlp=(lambda: mlp(8,32,16,4), (8,)), conv=(convnet, (3,8,8)), lstm=(LSTM, (8,)), norms=(no_bias, (8,)))
@pytest.mark.parametrize('make,shape', TRAINED.values(), ids=TRAINED)
def test_a_trained_model_is_not_thrown_away_in_silence(make, shape):
    "A warning before anything changes; none for a fresh model, nor where chance is meant or the masks are not by chance"
    torch.manual_seed(0)
    assert not told(sparsify_model, make(), .5)
    model = trained(make(), shape)
    new = lambda: copy.deepcopy(model)
    message, = told(sparsify_model, new(), .5)
    assert 'a training has changed these weights' in message and "keep='magnitude'" in message and "keep='random'" in message
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        before = snapshot(twin := new())
        with pytest.raises(UserWarning, match='a training'): sparsify_model(twin, .5)
        assert not changed(before, snapshot(twin))
        for kw in (dict(keep='magnitude'), dict(keep='random'), dict(score_f=weight_magnitude), dict(initial_sparsity=0.), dict(init_f=sparse_kaiming_normal_)):
            sparsify_model(new(), .5, **kw)

def test_a_fresh_head_on_a_trained_body():
    "What stays dense does not matter; one that is trained in the larger part does"
    model = nn.Sequential(trained(mlp(8,32,16,4))[:4], nn.Linear(16,64), nn.ReLU(), nn.Linear(64,4))
    torch.manual_seed(2)
    assert not told(sparsify_model, copy.deepcopy(model), .5, exclude='0')
    assert len(told(sparsify_model, model, .5))==1

def fresh():
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
    from fastai.vision.all import create_vision_model, xresnet18
    from torchvision import models
    config = {**awd_lstm_clas_config, 'emb_sz': 64, 'n_hid': 128, 'n_layers': 2}
    yield from ((n, partial(getattr(models, n), weights=None, num_classes=10)) for n in ('resnet18','mobilenet_v3_small','shufflenet_v2_x0_5','squeezenet1_1','mnasnet0_5','vit_b_32','regnet_y_400mf'))
    yield from dict(xresnet=partial(xresnet18, n_out=10), awd_lstm=lambda: get_text_classifier(AWD_LSTM, 100, 3, config=config),
        vision=lambda: create_vision_model(models.resnet18, 10, pretrained=False), gru=lambda: nn.GRU(64, 128, 2, bidirectional=True),
        bilinear=lambda: nn.Bilinear(16, 16, 100), transformer=lambda: nn.Transformer(64, 4, 2, 2, 128),
        grouped=lambda: nn.Sequential(nn.Conv2d(64,128,3,groups=4), nn.ConvTranspose2d(64,128,3,groups=4), nn.Conv1d(64,128,3), nn.LSTMCell(32,64))).items()

@pytest.mark.parametrize('make', [f for _,f in fresh()], ids=[n for n,_ in fresh()])
def test_fresh_models_do_not_look_trained(make):
    model = make()
    assert trained_weights(model, weight_names(model))==[]

def test_fresh_transformers_do_not_look_trained():
    T = pytest.importorskip('transformers')
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=100)
    gpt = T.GPT2LMHeadModel(T.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0))
    for model in (gpt, T.BertForSequenceClassification(T.BertConfig(**size)), T.LlamaForCausalLM(T.LlamaConfig(**size))):
        assert trained_weights(model, weight_names(model))==[]

def test_keep_magnitude_is_global_magnitude():
    a,b = mlp(8,8,8),mlp(8,8,8)
    b.load_state_dict(a.state_dict())
    sparsify_model(a, .75, keep='magnitude')
    sparsify_model(b, .75, sparse_f=global_sparsity(weight_magnitude), score_f=weight_magnitude)
    assert same_masks(masks(a), masks(b)) and not changed(snapshot(a), snapshot(b))
    loud,weak = torch.cat([m.weight[m.weight_mask] for m in (a[0], a[2])]).abs(),sum(nnz(a))
    assert weak==32 and len(loud)==32

@pytest.mark.parametrize('kwargs', [dict(sparse_f='uniform'), dict(sparse_f='erk'), dict(pattern_f=nm_pattern)], ids=['uniform', 'erk', 'pattern'])
def test_keep_beside_a_distribution_or_a_pattern(kwargs):
    a,b = mlp(8,8,8),mlp(8,8,8)
    b.load_state_dict(a.state_dict())
    sparsify_model(a, .5, keep='magnitude', **kwargs)
    sparsify_model(b, .5, score_f=weight_magnitude, **kwargs)
    assert same_masks(masks(a), masks(b))

def test_keep_takes_a_score_and_the_learner_passes_it_on():
    learn = learner(mlp(8,6,3))
    dense = copy.deepcopy(learn.model)
    learn.sparsify(.5, keep=lambda p, **kw: p.detach())
    kept,lost = (torch.cat([dense[i].weight[learn.model[i].weight_mask==on] for i in (0, 2)]) for on in (True, False))
    assert kept.min()>=lost.max() and len(kept)==len(lost)==33

def test_what_keep_refuses():
    refused_untouched(mlp(4,6,4), "keep must be a function or one of magnitude, random, got 'magnitud': did you mean magnitude", .5, keep='magnitud')
    refused_untouched(mlp(4,6,4), 'keep must be left out beside a score_f of its own', .5, keep='magnitude', score_f=lambda p, **kw: p)

# ------------------------------------------------------------ other cautions
class Standardized(nn.Conv2d):
    def forward(self, x): return F.conv2d(x, self.weight-self.weight.mean((1,2,3), keepdim=True), self.bias)
class Padded(nn.Conv2d):
    def forward(self, x): return super().forward(F.pad(x, (1,1,1,1)))
class TwoInputs(nn.Linear):
    def forward(self, x, y): return super().forward(x+y)

def test_a_formula_over_the_weight_is_named():
    message, = told(sparsify_model, nn.Sequential(nn.Conv2d(3,8,3), Standardized(8,8,3, groups=2, dilation=2), Standardized(8,8,3)), .5)
    assert message.startswith("'1' and 1 more: the layer makes other numbers of the zeros") and 'exclude' in message
    assert not told(sparsify_model, nn.Sequential(Padded(3,8,3), TwoInputs(8,8), nn.ConvTranspose2d(8,4,3, groups=2)), .5)
    assert not told(sparsify_model, nn.Sequential(nn.Conv2d(3,8,3), Standardized(8,8,3)), .5, exclude=1)

def test_asking_a_layer_changes_nothing():
    model = nn.Sequential(Standardized(4,8,3))
    weight,state = model[0].weight.clone(),torch.get_rng_state()
    assert not keeps_zeros(model[0]) and torch.equal(weight, model[0].weight) and torch.equal(state, torch.get_rng_state())

class Experts(nn.Module):
    def __init__(self, n=4): super().__init__(); self.up = nn.Parameter(torch.randn(n,8,16))
    def forward(self, x): return torch.einsum('bi,eio->bo', x, self.up)

def test_experts_in_one_tensor_are_named():
    dense, = told(sparsify_model, nn.Sequential(nn.Linear(8,8), Experts()), .5)
    assert "'1'" in dense and 'stay dense and are not counted' in dense and 'additional_types=[Experts]' in dense
    masked, = told(sparsify_model, nn.Sequential(nn.Linear(8,8), Experts()), .5, additional_types=[Experts])
    assert "'1.up'" in masked and 'get one mask' in masked
    assert not told(sparsify_model, nn.Sequential(nn.Linear(8,8), nn.Conv1d(8,8,3), Experts(1)), .5)

def test_adapters_stay_dense():
    "As peft names them; whoever asks for one by name is told"
    layer = nn.ModuleDict(dict(base_layer=nn.Linear(8,8), lora_A=nn.ModuleDict(dict(default=nn.Linear(8,2))), lora_B=nn.ModuleDict(dict(default=nn.Linear(2,8)))))
    sparsify_model(model := nn.ModuleDict(dict(proj=layer)), .5)
    assert [n for n,_ in model.named_buffers() if n.endswith('_mask')]==['proj.base_layer.weight_mask']
    unsparsify_model(model)
    refused_untouched(model, 'excluded and given a sparsity', .5, sparsities={'*lora_A*': .5})
    refused_untouched(layer['lora_A'] and nn.ModuleDict(dict(lora_A=nn.Linear(8,2))), 'an adapter', .5)

def test_add_mask_copies():
    layer,mask = nn.Linear(4,4),torch.eye(4).bool()
    add_mask(layer, 'weight', mask)
    layer.weight_mask.logical_not_()
    assert torch.equal(mask, torch.eye(4).bool())

def test_a_normalization_that_has_seen_no_batch_is_fresh():
    "Some networks draw its scale and shift at random"
    model = nn.Sequential(nn.Conv2d(3,8,3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    for p in model[1].parameters(): nn.init.normal_(p)
    assert trained_weights(model, weight_names(model))==[]
    model(torch.randn(4,3,8,8))
    assert len(trained_weights(model, weight_names(model)))==1

# ------------------------------------------------------------ zeros of another tool
@pytest.mark.parametrize('seed', range(4))
def test_zeros_are_taken_over(seed):
    g = torch.Generator().manual_seed(seed)
    model = mlp(8,24,20,6,3)
    weights = [m.weight for m in model if hasattr(m, 'weight')]
    for w,s in zip(weights[:3], torch.rand(3, generator=g)): w.data[torch.rand(w.shape, generator=g)<s] = 0
    before = snapshot(model)
    want = [w.detach()!=0 for w in weights[:3]]
    sparsify_model(model, masks='zeros')
    assert same_masks(masks(model), want) and not hasattr(model[-1], 'weight_mask') and not [k for k in changed(before, snapshot(model)) if 'mask' not in k and 'sparsity' not in k]
    assert [round(float(s)*p.numel()) for p,mask,s in sparse_params(model)]==[int((~m).sum()) for m in want]
    for w in weights: w.data.add_(1)
    model(torch.randn(2, 8))
    assert masked_are_zero(model) and (weights[-1]!=0).all()

def test_zeros_of_learners_negative_zeros_and_a_sparsity_that_fits():
    learn = learner(mlp(8,6,3))
    learn.model[0].weight.data[:,:4] = -0.
    learn.model[2].weight.data[0] = float('nan')
    learn.sparsify(masks='zeros')
    assert nnz(learn.model)==[24] and masked_are_zero(learn.model) and torch.signbit(learn.model[0].weight).sum(0)[:4].tolist()==[0]*4
    model = mlp(8,6,3)
    model[0].weight.data[:,:4] = 0
    sparsify_model(model, 24/66, masks='zeros')
    assert nnz(model)==[24]
    model = mlp(8,6,3)
    model[0].weight.data[:,:4] = 0
    model[2].weight.data[:,:4] = 0
    sparsify_model(model, masks='zeros', exclude=-1)
    assert nnz(model)==[24]

def test_what_zeros_refuse():
    model = mlp(8,6,3)
    refused_untouched(model, "must find a zero, got none among 66 weights", masks='zeros')
    model[0].weight.data[:,:4] = 0
    refused_untouched(model, "model_sparsity must be 0.363636 or left out with masks='zeros', as 24 of 66 weights are zero, got 0.5", .5, masks='zeros')
    refused_untouched(model, "sparsities must be left out with masks='zeros'", masks='zeros', sparsities={0: .5})
    refused_untouched(model, 'model_sparsity must be a number from 0 to 1, got None')
    with pytest.raises(TypeError, match='masks must be a dict'): sparsify_model(model, .5, masks='zeroes')

# ------------------------------------------------------------ `print(model)`
def test_a_printed_model_counts_active_weights():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.LSTM(2, 2), nn.MultiheadAttention(4, 1))
    plain = str(model)
    sparsify_model(model, 0.9)
    assert 'Linear(in_features=10, out_features=10, bias=True, active=10)' in str(model) and '(2): LSTM(2, 2, weight_ih_l0_active=2, weight_hh_l0_active=2)' in str(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    model[0].weight_mask.fill_(True)
    assert 'active=100)' in str(model[0]) and 'active=10)' in str(copied[0])                    # each counts its own
    assert str(unsparsify_model(model))==plain and not any('extra_repr' in vars(m) for m in model.modules())

def test_printing_looks_at_no_mask_without_values_and_keeps_words_of_the_layer_itself():
    model = nn.Sequential(nn.Linear(4, 4, device='meta'), nn.Linear(4, 4))
    model[1].extra_repr = lambda: 'mine'
    sparsify_model(model, 0.5)
    assert 'active' not in str(model[0]) and str(model[1])=='Linear(mine)'
    assert str(unsparsify_model(model)[1])=='Linear(mine)'
    model = nn.Sequential(nn.Linear(4, 4))
    sparsify_model(model, 0.5)
    del model[0].weight_mask
    assert str(model[0])=='Linear(in_features=4, out_features=4, bias=True)'

def test_a_compressed_layer_made_masked_again_counts_too():
    model = nn.Sequential(nn.Linear(40, 40))
    sparsify_model(model, 0.9)
    masked = str(model)
    to_sparse_layers(model)
    to_masked_layers(model)
    assert str(model)==masked and 'active=160)' in masked
