"From dense to sparse and back: masks, hooks, copies, files"
import copy, io, pickle, warnings
from functools import partial
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from helpers import changed, learner, masked_are_zero, masks, mlp, nnz, same_masks, snapshot
from fastai.callback.hook import Hooks
from sparsefast.distributions import *
from sparsefast.masks import masked_params, sparse_params
from sparsefast.sparsify import *

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
    with pytest.warns(UserWarning, match='a layer of 4 weights has none left'): sparsify_model(nn.Linear(2,2), .9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        sparsify_model(nn.Linear(2,2), 1.)                                               # asked for

# ------------------------------------------------------------ hooks
def test_hooks_enforce_until_removed():
    model = mlp(5,6,3)
    hooks = sparsify_model(model, .5)
    assert isinstance(hooks, Hooks) and n_hooks(model)==2
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
    with sparsify_model(model, .5): assert n_hooks(model)==2
    assert n_hooks(model)==0 and nnz(model)==[15,9]

def test_enforce_masks_replaces_its_own_hooks_only():
    model,calls = mlp(5,6,3),[]
    model[0].register_forward_pre_hook(lambda m, x: calls.append(1))
    sparsify_model(model, .5)
    enforce_masks(model)
    assert n_hooks(model)==3
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
