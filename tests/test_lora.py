"LoRA on a sparse base: a stand-in of plain modules, and peft where it is installed"
import copy, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from helpers import *
from sparsefast.attach import attach
from sparsefast.guard import guards
from sparsefast.masks import sparse_params
from sparsefast.presets import RigL
from sparsefast.ship.lora import *
from sparsefast.sparsify import add_mask, enforce_masks, sparsify_model

W = torch.tensor([[2,0,0,-1],[0,.5,0,0],[0,0,1,3.]])
A,B = torch.tensor([[.5,-1,0,2]]),torch.tensor([[1.],[2],[-1]])

class Lora(nn.Module):
    "Only what the module says an adapter has"
    def __init__(self, base, a=A, b=B, scaling=.5):
        super().__init__()
        self.base_layer,self.scaling = base,dict(x=scaling)
        self.lora_A,self.lora_B = (nn.ModuleDict(dict(x=nn.Linear(t.shape[1], t.shape[0], bias=False))) for t in (a, b))
        self.lora_A['x'].weight.data,self.lora_B['x'].weight.data = a.clone(),b.clone()
    def forward(self, x): return self.base_layer(x)+self.lora_B['x'](self.lora_A['x'](x))*self.scaling['x']

def stand_in(w=W, dtype=torch.float32, **kwargs):
    base = nn.Linear(w.shape[1], w.shape[0], bias=False).to(dtype)
    base.weight.data = w.to(dtype).clone()
    add_mask(base, 'weight', w!=0)
    model = nn.Sequential(Lora(base, **kwargs).to(dtype))
    enforce_masks(model)
    return model

def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)

def test_vector():
    model = stand_in()
    total,layers = lost_by_merge(model)
    assert total==pytest.approx(.7817, abs=1e-4) and layers=={'0': total}
    with pytest.warns(UserWarning, match='78.2% of the norm'): merged = merge_lora(model)
    assert merged is model and type(model[0]) is nn.Linear
    assert model[0].weight.tolist()==[[2.25,0,0,0],[0,-.5,0,0],[0,0,1,2]]
    assert torch.equal(model[0].weight_mask, W!=0)                                          # (0,3) is zero now, and active
    model[0].weight.data.fill_(1.)
    model(torch.ones(1, 4))
    assert torch.equal(model[0].weight!=0, W!=0)

def test_an_active_weight_of_zero_takes_part():
    model = stand_in()
    model[0].base_layer.weight_mask[1,0] = True
    quiet(merge_lora, model)
    assert model[0].weight.tolist()==[[2.25,0,0,0],[.5,-.5,0,0],[0,0,1,2]]

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_rounding(dtype):
    torch.manual_seed(0)
    w = torch.randn(40, 30)*(torch.rand(40, 30)<.4)
    a,b = torch.randn(3, 30),torch.randn(40, 3)
    model = stand_in(w, dtype, a=a, b=b, scaling=2/3)
    wide = torch.promote_types(dtype, torch.float32)
    mask,base = model[0].base_layer.weight_mask.clone(),model[0].base_layer.weight.detach().clone()
    update = (b.to(dtype).to(wide) @ a.to(dtype).to(wide))*(2/3)
    quiet(merge_lora, model)
    assert model[0].weight.dtype==dtype and torch.equal(model[0].weight[mask], (base.to(wide)+update).to(dtype)[mask]) and (model[0].weight[~mask]==0).all()

def test_refusals():
    with pytest.raises(ValueError, match='must have LoRA adapters, got Sequential'): merge_lora(mlp(4, 3))
    with pytest.raises(ValueError, match='plain LoRA adapters on masked layers'): masked_lora(mlp(4, 3))
    with pytest.raises(ValueError, match='lora_variant'): masked_lora(stand_in())

# ------------------------------------------------------------ peft
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv,self.a,self.b = nn.Conv2d(2, 6, 2, padding=1, padding_mode='circular'),nn.Linear(24, 16),nn.Linear(16, 3)
    def forward(self, x): return self.b(self.a(self.conv(x.view(-1,2,2,2))[:,:,:2,:2].flatten(1)).relu())

def peft_net(sparsity=.7, dtype=None, targets=('conv','a','b'), order='sparse first', **config):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    model = Net().to(dtype)
    if order=='sparse first': sparsify_model(model, sparsity)
    model = quiet(peft.get_peft_model, model, peft.LoraConfig(target_modules=list(targets), **{**dict(r=2, lora_alpha=3), **config}))
    if order!='sparse first': sparsify_model(model, sparsity)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values(): nn.init.normal_(b.weight, std=.3)
    return model

def train(model, method=None, n=12, **kwargs):
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=.05, weight_decay=.1)
    attached = attach(method, model, opt, n) if method else None
    for x,y in batches(n):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    if attached: attached.remove()
    return model

ways = dict(plain=dict(), rslora=dict(use_rslora=True), dropout=dict(lora_dropout=.2), bias=dict(lora_bias=True))

@pytest.mark.parametrize('order', ['sparse first', 'adapters first'])
@pytest.mark.parametrize('method', [None, 'static', RigL(update_every=2)], ids=['none','static','RigL'])
def test_the_bases_zeros_stay(method, order):
    model = peft_net(order=order)
    n,before,start = len(list(guards(model))),snapshot(model),masks(model)
    quiet(train, model, method)
    moved = changed(before, snapshot(model))
    assert n==4 and len(list(guards(model)))==4 and same_masks(start, masks(model)) and len(start)==3
    assert moved and all('lora_' in k for k in moved) and masked_are_zero(model)
    for m in model.modules():
        if hasattr(m, 'weight_mask'): m.weight.data.fill_(1.)
    for mode in (True, False):
        with torch.set_grad_enabled(mode): model.train(mode)(batches(1)[0][0])
        assert masked_are_zero(model)

@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('way', ways)
def test_merge_is_the_formula(way, dtype):
    model = quiet(train, peft_net(dtype=None, **ways[way])).to(dtype)
    want = {}
    for n,layer in lora_layers(model).items():
        base,a,b = layer.base_layer,layer.lora_A['default'].weight.detach().float(),layer.lora_B['default'].weight.detach().float()
        delta = torch.einsum('or,rikl->oikl', b[:,:,0,0], a) if a.dim()==4 else b @ a
        want[n.split('.')[-1]] = (base.weight.detach().float()+base.weight_mask*layer.scaling['default']*delta).to(base.weight.dtype), base.weight_mask.clone()
    merged = quiet(merge_lora, model)
    assert type(merged) is Net and not lora_layers(merged) and len(list(guards(merged)))==4
    for n,(w,mask) in want.items():
        m = getattr(merged, n)
        assert torch.allclose(m.weight, w, rtol=2e-6 if dtype is None else 1e-2, atol=1e-7) and torch.equal(m.weight_mask, mask) and (m.weight[~mask]==0).all()

@torch.no_grad()
def logits(model): return model.eval()(batches(1, bs=32, seed=7)[0][0])

@pytest.mark.parametrize('way', ways)
def test_what_was_trained_masked_is_what_is_merged(way):
    model = masked_lora(peft_net(**ways[way]))
    quiet(train, model)
    assert lost_by_merge(model)[0]==0
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        merged = merge_lora(model)
    assert torch.allclose(logits(merged), before, atol=1e-5) and masked_are_zero(merged)
    plain = quiet(train, peft_net(**ways[way]))
    before = logits(plain)
    assert 0.3<lost_by_merge(plain)[0]<1 and not torch.allclose(logits(quiet(merge_lora, plain)), before, atol=1e-2)

def test_masked_training_has_the_formulas_gradients():
    model = masked_lora(peft_net(targets=('a',)))
    layer = next(iter(lora_layers(model).values()))
    x,g = torch.randn(5, 24),torch.randn(5, 16)
    a,b,s,m = layer.lora_A['default'].weight,layer.lora_B['default'].weight,layer.scaling['default'],layer.base_layer.weight_mask
    y = layer(x)
    assert torch.allclose(y, layer.base_layer(x)+x @ (m*(s*b @ a)).T, atol=1e-6)
    y.backward(g)
    inner = (g.T @ x)*m
    assert torch.allclose(a.grad, s*b.T @ inner, atol=1e-5) and torch.allclose(b.grad, s*inner @ a.T, atol=1e-5)

def test_hugging_faces_linear_layer():
    peft,Conv1D = pytest.importorskip('peft'),pytest.importorskip('transformers.pytorch_utils').Conv1D
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(c=Conv1D(6, 8)))
    model.forward = lambda x: model['c'](x)
    sparsify_model(model, .6)
    mask = model['c'].weight_mask.clone()
    wrapped = quiet(peft.get_peft_model, model, peft.LoraConfig(target_modules=['c'], r=2, fan_in_fan_out=True))
    for layer in lora_layers(wrapped).values(): nn.init.normal_(layer.lora_B['default'].weight)
    masked_lora(wrapped)
    x = torch.randn(4, 8)
    with torch.no_grad(): before = model(x)
    quiet(merge_lora, wrapped)
    assert torch.allclose(model(x), before, atol=1e-5) and torch.equal(model['c'].weight_mask, mask) and (model['c'].weight[~mask]==0).all()

def test_pefts_own_merge_goes_through_the_mask_and_back():
    model = masked_lora(peft_net())
    before,start = logits(model),snapshot(model)
    for safe in (True, False):
        model.merge_adapter(safe_merge=safe)
        assert masked_are_zero(model) and torch.allclose(logits(model), before, atol=1e-5)
        model.unmerge_adapter()
        now = snapshot(model)
        assert all(torch.allclose(now[k].float(), start[k].float(), atol=1e-6) for k in start) and masked_are_zero(model)
    assert torch.allclose(logits(copy.deepcopy(model)), before, atol=1e-6)
    with model.disable_adapter(): assert not torch.allclose(logits(model), before)

def test_several_adapters_and_names():
    peft = pytest.importorskip('peft')
    model = peft_net(targets=('a','b'))
    model.add_adapter('other', peft.LoraConfig(target_modules=['a'], r=3))
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values(): nn.init.normal_(b.weight)
    w = model.base_model.model.a.base_layer.weight.detach().clone()
    layer = model.base_model.model.a
    want = torch.where(layer.base_layer.weight_mask, w+lora_update(layer, 'default')+lora_update(layer, 'other'), 0)
    merged = quiet(merge_lora, model, ['default', 'other'])
    assert torch.allclose(merged.a.weight, want, atol=1e-6)

def test_dora_and_unmasked_layers_are_left_to_peft():
    model = peft_net(use_dora=True, targets=('a','b'))
    with pytest.raises(ValueError, match='plain LoRA'): masked_lora(model)
    with torch.no_grad():
        for layer in lora_layers(model).values(): nn.init.normal_(layer.lora_B['default'].weight)
    with pytest.warns(UserWarning, match='of the norm of the adapters. updates is lost'): merged = merge_lora(model)
    assert masked_are_zero(merged) and not lora_layers(merged) and lost_by_merge(merged)==(0., {})
    model = peft_net(sparsity=0., targets=('a','b'))                                         # (peft's own adapters of convolutions pad with zeros)
    before = logits(model)
    assert torch.allclose(logits(merge_lora(model)), before, atol=1e-5)

def test_adapters_that_were_injected():
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    net = Net()
    sparsify_model(net, .7, exclude='b')
    net = quiet(peft.inject_adapter_in_model, peft.LoraConfig(target_modules=['a','b'], r=2), net)
    for layer in lora_layers(net).values(): nn.init.normal_(layer.lora_B['default'].weight)
    masked_lora(net)
    before = logits(net)
    merged = merge_lora(net)
    assert merged is net and not lora_layers(net) and torch.allclose(logits(net), before, atol=1e-5) and masked_are_zero(net)
