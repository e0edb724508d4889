"Every layer that a real model contains: attention, recurrence, embeddings, groups, ties, lazy ones; each used as torch uses it"
import copy
import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from fastai.text.models.awdlstm import AWD_LSTM, WeightDropout
from sparsefast.all import *
from sparsefast.masks import masked_params
from sparsefast.select import maskable
from helpers import *

class Last(nn.Module):
    "The output of a recurrent layer at the last place"
    def __init__(self, rnn): super().__init__(); self.rnn = rnn
    def forward(self, x): return (self.rnn(x)[0] if isinstance(self.rnn, (nn.RNNBase, WeightDropout)) else (h[0] if isinstance(h := self.rnn(x[:,-1]), tuple) else h)[:,None])[:,-1]

class Attend(nn.Module):
    def __init__(self, **kw): super().__init__(); self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **kw)
    def forward(self, x):
        kv = x[..., :self.attn.kdim]
        return self.attn(x, x if self.attn._qkv_same_embed_dim else kv, x if self.attn._qkv_same_embed_dim else kv)[0].mean(1)

class Twice(nn.Module):
    "One layer, used twice in a forward"
    def __init__(self): super().__init__(); self.lin = nn.Linear(8, 8)
    def forward(self, x): return self.lin(torch.relu(self.lin(x.mean(1))))

class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.bi = nn.Bilinear(8, 8, 8)
    def forward(self, x): return self.bi(x[:,0], x[:,-1])

MODELS = dict(lstm=lambda: Last(nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True, proj_size=4)), gru=lambda: Last(nn.GRU(8, 8, batch_first=True)), rnn=lambda: Last(nn.RNN(8, 8, batch_first=True)),
    lstm_cell=lambda: Last(nn.LSTMCell(8, 8)), gru_cell=lambda: Last(nn.GRUCell(8, 8)), rnn_cell=lambda: Last(nn.RNNCell(8, 8)), weight_dropout=lambda: Last(WeightDropout(nn.LSTM(8, 8, batch_first=True), .3)),
    attention=Attend, attention_kv=lambda: Attend(kdim=4, vdim=4), encoder=lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 8)),
    twice=Twice, bilinear=TwoInputs, grouped=lambda: nn.Sequential(nn.Conv1d(5, 10, 1), nn.Conv1d(10, 20, 3, groups=5), nn.Flatten(), nn.Linear(120, 8)),
    transposed=lambda: nn.Sequential(nn.ConvTranspose1d(5, 6, 3), nn.Flatten(), nn.Linear(60, 8)))

def build(name):
    torch.manual_seed(0)
    return nn.Sequential(MODELS[name](), nn.Linear(8, 3))

def data(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 5, 8, generator=gen), torch.randint(3, (6,), generator=gen)) for _ in range(n)]

def fit(model, m, opt, total=20, look=noop):
    for step,(x,y) in enumerate(data(total), 1):
        nn.functional.cross_entropy(model(x), y).backward()
        m.step(model, opt, step, (step-1)/total)
        opt.zero_grad()
        look()

NAMES = dict(lstm=['weight_ih_l0', 'weight_hh_l0', 'weight_hr_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse', 'weight_hr_l0_reverse', 'weight_ih_l1', 'weight_hh_l1', 'weight_hr_l1', 'weight_ih_l1_reverse',
                   'weight_hh_l1_reverse', 'weight_hr_l1_reverse'], gru=['weight_ih_l0', 'weight_hh_l0'], rnn=['weight_ih_l0', 'weight_hh_l0'], lstm_cell=['weight_ih', 'weight_hh'], gru_cell=['weight_ih', 'weight_hh'],
             rnn_cell=['weight_ih', 'weight_hh'], weight_dropout=['weight_hh_l0_raw', 'weight_ih_l0'], attention=['in_proj_weight', 'weight'], attention_kv=['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'weight'],
             encoder=['in_proj_weight', 'weight', 'weight', 'weight', 'weight'], twice=['weight'], bilinear=['weight'], grouped=['weight']*3, transposed=['weight', 'weight'])

@pytest.mark.parametrize('name', MODELS)
def test_what_is_masked(name):
    model = build(name)
    sparsify_model(model, .5)
    assert [n for _,n,*_ in masked_params(model)]==[*NAMES[name], 'weight']
    assert all(int(mask.sum())==round(.5*p.numel()) for p,mask,_ in sparse_params(model))
    dense = {n for n,p in model.named_parameters() if p.dim()>1}-{f'{k[:-5]}' for k in dict(model.named_buffers()) if k.endswith('_mask')}
    assert not dense                                                                          # no weight of two dimensions has been overlooked

@pytest.mark.parametrize('preset', ['SET', 'SNFS', 'RigL'])
@pytest.mark.parametrize('name', MODELS)
def test_trains(name, preset):
    "Exact in number, masked weights zero, masks move; without the hooks' help"
    model = build(name)
    sparsify_model(model, .5, enforce_mask=False)
    before,first = sum(nnz(model)),masks(model)
    m,opt = DSTMethod(**{**globals()[f'{preset}_presets'], 'batches_per_update': 4, 'replaces_step': False}), torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-2)
    def look(): assert sum(nnz(model))==before and masked_are_zero(model)
    fit(model, m, opt, look=look)
    assert not any(torch.equal(a, b) for a,b in zip(first, masks(model)))

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('training', [True, False])
def test_hooks_enforce_wherever_the_weight_is_used(name, training):
    "A forward with weights written from outside is that of the baked model"
    model = build(name)
    sparsify_model(model, .5)
    with torch.no_grad():
        for p,*_ in sparse_params(model): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        if name=='weight_dropout': model[0].rnn.reset()                                       # what fastai's layer holds can be copied only then
    baked = unsparsify_model(copy.deepcopy(model))
    x = data(1)[0][0]
    def run(m):
        torch.manual_seed(2)
        with torch.no_grad(): return m.train(training)(x)
    assert torch.equal(run(model), run(baked)) or torch.allclose(run(model), run(baked), atol=1e-6)
    assert masked_are_zero(model)

def test_fast_path_of_the_encoder_sees_masks(monkeypatch):
    "In evaluation torch has a kernel for the whole layer, which asks nobody"
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    sparsify_model(layer, .5)
    used = []
    monkeypatch.setattr(torch, '_transformer_encoder_layer_fwd', lambda *args: used.append(args))
    with torch.no_grad():
        layer.self_attn.in_proj_weight.add_(1.)
        layer(data(1)[0][0])
    assert not used and masked_are_zero(layer)

@pytest.mark.parametrize('kind', ['LSTM', 'GRU', 'RNN'])
def test_recurrent_weights_stay_flat(kind):
    "The weights keep their place in memory, so that those flattened for cuDNN stay usable"
    rnn = getattr(nn, kind)(8, 8)
    where = [p.data_ptr() for p in rnn._flat_weights]
    sparsify_model(rnn, .5)
    rnn(torch.randn(3, 2, 8))
    assert [p.data_ptr() for p in rnn._flat_weights]==where and all(a is b for a,b in zip(rnn._flat_weights, [getattr(rnn, n) for n in rnn._flat_weights_names]))
    rnn.flatten_parameters()

def test_awd_lstm():
    torch.manual_seed(0)
    model = AWD_LSTM(20, 8, 12, 2)
    sparsify_model(model, .5)
    assert [n for _,n,*_ in masked_params(model)]==['weight_hh_l0_raw', 'weight_ih_l0']*2
    model.reset()
    model.eval()(torch.randint(20, (2, 4)))
    raw = model.rnns[0].weight_hh_l0_raw
    assert (model.rnns[0].module.weight_hh_l0[raw==0]==0).all() and raw.count_nonzero()==raw.numel()//2

def test_embeddings_on_request():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    assert list(weight_names(model).values())==['1'] and list(weight_names(model, [nn.Embedding]).values())==['0', '1']
    sparsify_model(model, .5, additional_types=[nn.Embedding])
    assert nnz(model)==[80, 16]

def test_a_type_of_ones_own():
    class Experts(nn.Module):
        def __init__(self): super().__init__(); self.up,self.down,self.scale = nn.Parameter(torch.randn(4,8,6)), nn.Parameter(torch.randn(4,6,8)), nn.Parameter(torch.ones(8))
        def forward(self, x): return torch.einsum('bi,eij,ejk->bk', x, self.up, self.down)*self.scale
    model = nn.Sequential(Experts(), nn.Linear(8, 3))
    hooks = sparsify_model(model, .5, additional_types=[Experts])
    assert list(weight_names(model, [Experts]).values())==['0.up', '0.down', '1'] and nnz(model)==[96, 96, 12] and len(hooks.hooks)==5
    model[0].up.data.fill_(1.)
    model(torch.randn(2, 8))
    assert masked_are_zero(model)

class Reads(nn.Module):
    "Multiplies by weights of layers that it never calls"
    def __init__(self): super().__init__(); self.qkv,self.out,self.called = nn.Linear(8, 12, bias=False), nn.Linear(12, 8), nn.Linear(8, 8)
    def forward(self, x): return self.called(nn.functional.linear(nn.functional.linear(x, self.qkv.weight), self.out.weight, self.out.bias))

@pytest.mark.parametrize('copied', [False, True])
def test_weights_that_a_parent_reads(copied):
    "Vision transformers do so; the layer's own hook never fires"
    model = nn.Sequential(nn.Sequential(Reads()))
    hooks = sparsify_model(model, .5)
    if copied: model = copy.deepcopy(model)
    with torch.no_grad():
        for p,*_ in sparse_params(model): p.add_(1.)
    baked = unsparsify_model(copy.deepcopy(model))
    x = data(1)[0][0]
    assert torch.equal(model(x), baked(x)) and masked_are_zero(model) and len(hooks.hooks)==6       # three layers, and the model before and after its forward and before it loads
    hooks.remove()
    assert copied or not any(m._forward_pre_hooks for m in model.modules())

def test_timm_models_that_read_weights():
    timm = pytest.importorskip('timm')
    model = timm.create_model('swinv2_cr_tiny_ns_224', img_size=64, depths=(1, 1), num_heads=(2, 2), embed_dim=16, window_size=4, num_classes=3)
    beit = timm.create_model('beit_base_patch16_224', img_size=32, depth=1, embed_dim=16, num_heads=2, num_classes=3)
    for m,size in ((model, 64), (beit, 32)):
        sparsify_model(m.eval(), .5)
        with torch.no_grad():
            for p,*_ in sparse_params(m): p.add_(1.)
            m(torch.randn(1, 3, size, size))
        assert masked_are_zero(m)

# ------------------------------------------------------------ depthwise
def mobile(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, groups=4))

def test_depthwise_stays_dense_and_is_not_counted():
    model = mobile()
    sparsify_model(model, .5)
    assert 'weight_mask' not in model[1]._buffers and nnz(model)==[108, 64, 288]
    sparsify_model(model := mobile(), .5, depthwise=True)
    assert nnz(model)==[108, 36, 64, 288]

def test_depthwise_alone_says_how():
    with pytest.raises(ValueError, match='depthwise=True'): sparsify_model(nn.Conv2d(8, 8, 3, groups=8), .5)
    with pytest.raises(ValueError, match='1.*depthwise=True'): sparsify_model(mobile(), .5, sparsities={1: .5})

# ------------------------------------------------------------ tied, lazy, parametrized
class Tied(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.emb,self.mid,self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.emb.weight
        if order: self.again = nn.Linear(8, 9); self.again.weight = self.emb.weight
    def forward(self, x): return self.head(self.mid(self.emb(x)))

@pytest.mark.parametrize('order', [False, True])
def test_tied_weights_are_one(order):
    model = Tied(order)
    sparsify_model(model, .5)
    assert nnz(model)==[32, 36] and sum('mask' in n for n,_ in model.named_buffers())==2
    model.emb.weight.data.fill_(1.)
    hidden = {}
    model.emb.register_forward_hook(lambda m, i, o: hidden.update(o=o))
    model(torch.arange(9))
    mask = next(mask for p,mask,_ in sparse_params(model) if p is model.emb.weight)
    assert torch.equal(hidden['o']!=0, mask) and masked_are_zero(model)                       # the embedding is a user too, and comes first

def test_excluding_one_name_of_a_tied_weight_excludes_it():
    model = Tied(True)
    sparsify_model(model, .5, exclude='again')
    assert [n for n,b in model.named_buffers() if n.endswith('_mask')]==['mid.weight_mask']

def test_lazy_layers():
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match='0 does not know its shape yet: run one batch'): sparsify_model(model, .5)
    model(torch.randn(2, 4))
    sparsify_model(model, .5)
    assert nnz(model)==[12, 9]

@pytest.mark.parametrize('norm', [weight_norm, parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.spectral_norm])
@pytest.mark.filterwarnings('ignore')
def test_parametrized_layers(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm(nn.Linear(4, 4)))
    before = {k: v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(ValueError, match='1 has no plain parameter `weight`.*exclude it'): sparsify_model(model, .5)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    sparsify_model(model, .5, exclude='1')
    assert nnz(model)==[8]

@pytest.mark.parametrize('norm', [weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings('ignore')
def test_parametrized_recurrence(norm):
    with pytest.raises(ValueError, match='weight_hh_l0 has no plain parameter `weight_hh_l0`'): sparsify_model(norm(nn.LSTM(4, 4), 'weight_hh_l0'), .5)

# ------------------------------------------------------------ weights of shape (inputs, outputs)
def test_patterns_look_along_the_inputs():
    "A transposed convolution has its inputs first"
    model = nn.Sequential(nn.ConvTranspose1d(8, 6, 3))
    sparsify_model(model, .5, pattern_f=nm_pattern)
    mask = model[0].weight_mask                                                               # (inputs, outputs, kernel)
    groups = mask.view(2, 4, 6, 3).sum(1)
    assert (groups==2).all() and not (mask.transpose(0, 1).reshape(8, 6, 3).view(2, 4, 6, 3).sum(1)==2).all()
    m = DSTMethod(**{**SET_presets, 'batches_per_update': 1, 'pattern_f': nm_pattern})
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for step in range(1, 5):
        model(torch.randn(2, 8, 4)).square().sum().backward()
        m.step(model, opt, step, (step-1)/5)
    assert not torch.equal(mask, model[0].weight_mask.clone().zero_()) and (model[0].weight_mask.view(2, 4, 6, 3).sum(1)==2).all()

# ------------------------------------------------------------ Hugging Face
def test_hugging_face():
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    sparsify_model(model, .75, exclude='lm_head', pattern_f=fan_in_pattern)
    owners = [(type(m).__name__, p.shape, mask) for m,n,p,mask in masked_params(model)]
    assert len(owners)==8 and {o[0] for o in owners}=={'Conv1D'} and all((mask.sum(0)==mask.shape[0]//4).all() for *_,mask in owners)   # inputs first
    opt,m = torch.optim.AdamW(model.parameters()), DSTMethod(**{**RigL_presets, 'batches_per_update': 3, 'replaces_step': False})
    for step in range(1, 10):
        x = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(step))
        model(x, labels=x).loss.backward()
        m.step(model, opt, step, (step-1)/9)
        opt.zero_grad()
        assert masked_are_zero(model)
    sparsify_model(model2 := transformers.GPT2LMHeadModel(model.config), .5)
    tied = model2.transformer.wte.weight
    assert tied is model2.lm_head.weight and sum(p is tied for p,*_ in sparse_params(model2))==1
