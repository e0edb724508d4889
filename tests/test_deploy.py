"to_fastest: what it decides when times are known, that outputs and state stay, and what it refuses. Times themselves are for benchmarks"
import io, re, warnings
from copy import deepcopy
from functools import partial
from types import MethodType
import pytest, torch, torch.nn.functional as F
from torch import nn
from helpers import changed, mlp, snapshot
from sparsefast.ship import deploy
from sparsefast.ship.deploy import LayerTime, SpeedTable, bsr_form, from_fastest, paired_times, processor, ratio, semi_structured_form, to_fastest
from sparsefast.ship.export import bake
from sparsefast.ship.files import load_sparse, save_sparse
from sparsefast.ship.fold import Folded, Fused, Pool, fold, fold_norm, is_folded, unfold
from sparsefast.ship.graph import Call, find_chain, trace
from sparsefast.storage import SparseConv2d, SparseLinear
from sparsefast.masks import masked_params
from sparsefast.patterns import block_pattern, nm_pattern
from sparsefast.sparsify import sparsify_model, unsparsify_model

@pytest.fixture
def clock(monkeypatch):
    "Times by name of the form, or by (form, width of the input); calls are counted"
    known,calls = dict(dense=1., sparse=0.4, fast=0.8), []
    def fake(fs, seconds=0, least=0, device=None):
        for f in fs.values(): f()
        calls.append(list(fs))
        return {n: [known[n]() if callable(known[n]) else known[n]]*3 for n in fs}
    monkeypatch.setattr(deploy, 'paired_times', fake)
    known['calls'] = calls
    return known

def n_sparse(model): return sum(isinstance(m, (SparseLinear, SparseConv2d)) for m in model.modules())

def nets():
    torch.manual_seed(0)
    class Calls(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 4)
        def forward(self, x, scale=None): return self.b(self.a(self.a(x))*scale)
    return dict(mlp=(mlp(8, 24, 20, 3), torch.randn(4, 8)), double=(mlp(8, 24, 3, dtype=torch.float64), torch.randn(4, 8).double()),
        convs=(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, stride=2), nn.Flatten(), nn.Linear(8*9, 3)), torch.randn(2, 3, 6, 6)),
        encoder=(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False), torch.randn(2, 5, 16)),
        twice=(Calls(), dict(x=torch.randn(2, 8), scale=torch.tensor(2.))), args=(Calls(), (torch.randn(2, 8), torch.tensor(2.))),
        root=(nn.Linear(8, 6), torch.randn(3, 8)), lstm=(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5)), torch.randn(3, 2, 6)))

@pytest.mark.parametrize('name', nets())
@pytest.mark.parametrize('training', [True, False])
def test_same_outputs_and_the_way_back(name, training, clock):
    model,x = nets()[name]
    sparsify_model(model.train(training), 0.7)
    before,hooks = snapshot(model),[len(m._forward_pre_hooks) for m in model.modules()]
    fast,table = to_fastest(model, x)
    assert not changed(before, snapshot(model)) and hooks==[len(m._forward_pre_hooks) for m in model.modules()] and model.training==training and not fast.training
    assert n_sparse(fast)==sum(r.form=='sparse' for r in table.rows)>0 and table.gain==1/0.8
    assert not any(m._forward_pre_hooks for m in fast.modules())
    with torch.no_grad(): a,b = deploy._call(deepcopy(model).eval(), x),deploy._call(fast, x)
    for i,j in zip(a if isinstance(a, tuple) else [a], b if isinstance(b, tuple) else [b]):
        if torch.is_tensor(i): torch.testing.assert_close(i, j)
    assert len(table.rows)==len(list(masked_params(model)))
    back = from_fastest(fast)
    assert not changed(before, snapshot(back)) and n_sparse(back)==0 and sum(len(m._forward_pre_hooks) for m in back.modules())==sum(hooks)
    assert {k: v.shape for k,v in back.state_dict().items()}=={k: v.shape for k,v in model.state_dict().items()}

def test_a_compressed_model(clock):
    "Layers that are compressed already are measured like masked ones, and the model stays as it is"
    from sparsefast.storage import SparseLinear, to_sparse_layers
    model,x = nets()['mlp']
    sparsify_model(model, .9)
    to_sparse_layers(model)
    fast,table = to_fastest(model, x)
    assert any(isinstance(m, SparseLinear) for m in model.modules())
    assert len(table.rows)==sum(isinstance(m, (nn.Linear, SparseLinear)) for m in model.modules())
    torch.testing.assert_close(fast(x), model.eval()(x))

def test_a_layer_called_twice_counts_twice(clock):
    model,x = nets()['twice']
    sparsify_model(model, 0.5)
    rows = {r.name: r for r in to_fastest(model, x)[1].rows}
    assert rows['a'].ms==dict(dense=2000., sparse=800.) and rows['b'].ms==dict(dense=1000., sparse=400.)

@pytest.mark.parametrize('sparse, margin, form', [(0.95, 1.1, 'dense'), (0.95, 1.05, 'sparse'), (0.9, 1.1, 'sparse'), (1.2, 1, 'dense'), (0.6, 2, 'dense')])
def test_margin(sparse, margin, form, clock):
    clock['sparse'] = sparse
    model,x = nets()['mlp']
    sparsify_model(model, 0.5)
    fast,table = to_fastest(model, x, margin=margin)
    assert {r.form for r in table.rows}=={form} and n_sparse(fast)==3*(form=='sparse')
    assert table.rows[0].gain==(1/sparse if form=='sparse' else 1)

def test_what_loses_in_company_goes_back(clock, monkeypatch):
    "Half of the layers, those that win by least, and half again"
    gains = iter([0.5, 0.2, 0.4])
    wholes = iter([1.5, 1.1, 0.7])
    clock['sparse'],clock['fast'] = lambda: next(gains),lambda: next(wholes)
    def fake(fs, *args, **kw): return {n: [clock[n]() if callable(clock[n]) else clock[n]] for n in fs}
    monkeypatch.setattr(deploy, 'paired_times', fake)
    model,x = nets()['mlp']
    sparsify_model(model, 0.5)
    fast,table = to_fastest(model, x)
    assert [r.form for r in table.rows]==['dense','dense','dense'] and n_sparse(fast)==0 and table.gain==1. and table.whole['fast']==table.whole['dense']
    assert [r.note for r in table.rows]==['2.00x alone, not in the model', '5.00x alone, not in the model', '2.50x alone, not in the model']
    assert not is_folded(fast)
    gains,wholes = iter([0.5, 0.2, 0.4]),iter([1.5, 0.9])
    fast,table = to_fastest(model, x)
    assert [r.form for r in table.rows]==['dense','sparse','dense'] and isinstance(fast[2], SparseLinear) and type(fast[0]) is nn.Linear and table.gain==1/0.9
    assert not changed(snapshot(model), snapshot(from_fastest(fast)))

def test_nothing_wins(clock):
    clock['sparse'] = 3.
    model,x = nets()['convs']
    model.append(nn.ReLU())
    sparsify_model(model, 0.5)
    for whole,gain in ((1.2, 1.), (.8, 1.25)):                                           # dense convolutions take the batch norm in, if that helps
        clock['fast'] = whole
        fast,table = to_fastest(model, x)
        assert n_sparse(fast)==0 and table.gain==gain and is_folded(fast)==(gain>1) and not changed(snapshot(model), snapshot(fast))
        assert [r.folds for r in table.rows]==(['norm+relu', '', ''] if gain>1 else ['', '', '']) and not any(c=='folded' for c in table.cells()[0])==(gain==1)
    mlp,x = nets()['mlp']
    sparsify_model(mlp, .5)
    assert to_fastest(mlp, x)[1].gain==1                                                  # and a ReLU alone is no reason

@pytest.mark.parametrize('dense, sparse, note', [(1., 1/.93, '0.93x here'), (1., .95, '1.05x here'), (4e-5, 8e-5, 'too small: 0.50x here'), (1., .5, '')])
def test_the_reason_for_staying_dense(dense, sparse, note, clock):
    clock.update(dense=dense, sparse=sparse)
    model,x = nets()['root']
    sparsify_model(model, .5)
    row, = to_fastest(model, x)[1].rows
    assert row.note==note and (row.form=='dense')==bool(note)

def test_the_table_names_the_kernel(clock, monkeypatch):
    from sparsefast import ops
    model,x = nets()['mlp']
    sparsify_model(model, .5)
    table = to_fastest(model, x)[1]
    assert table.kernel==('torch' if ops._kernels is None else 'compiled') and f'kernel: {table.kernel}' in repr(table) and f'kernel: {table.kernel}' in table._repr_html_()
    monkeypatch.setattr(ops, '_kernels', None)
    assert 'kernel: torch' in repr(to_fastest(model, x)[1])

def test_forms_of_ones_own(clock):
    clock['mine'] = 0.1
    def mine(m):
        if m.out_features==20: raise ValueError('not this one')
        return deploy.sparse_form(m)
    model,x = nets()['mlp']
    sparsify_model(model, 0.5)
    fast,table = to_fastest(model, x, forms=dict(mine=mine))
    assert [r.form for r in table.rows]==['mine','dense','mine'] and table.rows[1].note=='mine: not this one' and 'mine ms' in repr(table)

def test_notes(clock):
    model,x = nets()['encoder']
    sparsify_model(model, 0.5)
    rows = {r.name: r for r in to_fastest(model, x)[1].rows}
    assert 'MultiheadAttention has no sparse form' in rows['layers.0.self_attn.in_proj_weight'].note
    assert 'not called' in rows['layers.0.self_attn.out_proj'].note and rows['layers.0.linear1'].form=='sparse'
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    sparsify_model(tied, 0.5)
    fast,table = to_fastest(tied, torch.randn(2, 6))
    assert [r.note for r in table.rows]==['its weight is used twice'] and fast[0].weight is fast[2].weight

def test_a_module_used_in_two_places(clock):
    lin = nn.Linear(6, 6)
    model = nn.Sequential(lin, nn.ReLU(), nn.Sequential(lin))
    sparsify_model(model, 0.5)
    fast,table = to_fastest(model, torch.randn(2, 6))
    assert isinstance(fast[0], SparseLinear) and fast[0] is fast[2][0] and len(table.rows)==1
    assert type((back := from_fastest(fast))[0]) is nn.Linear and back[0] is back[2][0]

def test_transformers_and_timm(clock):
    transformers = pytest.importorskip('transformers')
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16))
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30))
    resnet,vit = timm.create_model('resnet10t', num_classes=3),timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3)
    ids = dict(input_ids=torch.randint(30, (2, 7)))
    for model,x,n in ((gpt, ids, 8), (bert, ids, 12), (resnet, torch.randn(1, 3, 32, 32), None), (vit, torch.randn(1, 3, 32, 32), 8)):
        sparsify_model(model, 0.8)
        before = snapshot(model)
        fast,table = to_fastest(model, x)
        assert n_sparse(fast)>=(n or 10)
        assert not changed(before, snapshot(from_fastest(fast)))

def test_to_a_file_and_back(clock, tmp_path):
    model,x = nets()['convs']
    sparsify_model(model, 0.6)
    fast,_ = to_fastest(model, x)
    save_sparse(fast, tmp_path/'m')
    other = nets()['convs'][0]
    load_sparse(tmp_path/'m', other)
    assert not changed(snapshot(model), snapshot(other))

def test_learners(clock):
    class Wrapped: pass
    learn = Wrapped()
    learn.model,x = nets()['mlp']
    sparsify_model(learn.model, 0.5)
    before = snapshot(learn.model)
    learn.model = to_fastest(learn, x)[0]
    assert n_sparse(learn.model)==3 and not changed(before, snapshot(from_fastest(learn)))

# ------------------------------------------------------------ folding
class BasicBlock(nn.Module):
    "As in torchvision: the batch norms, the residual and in-place ReLUs"
    def __init__(self, c, o, stride=1, relu=nn.ReLU(inplace=True)):
        super().__init__()
        self.conv1,self.conv2 = nn.Conv2d(c, o, 3, stride, 1, bias=False),nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn1,self.bn2,self.relu = nn.BatchNorm2d(o),nn.BatchNorm2d(o),relu
        self.downsample = nn.Sequential(nn.Conv2d(c, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride>1 or c!=o else None
    def forward(self, x):
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None: identity = self.downsample(x)
        out += identity
        return self.relu(out)

def resnet(**kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(16, 16, **kw), BasicBlock(16, 24, 2, **kw),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    return live(net).double(), torch.randn(2, 3, 16, 16).double()

def live(net):
    "Statistics and biases that are not those of a new network"
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(), m.running_var.uniform_(.5, 2)
            if m.affine: nn.init.normal_(m.weight), nn.init.normal_(m.bias)
    return net

def faster(net, x, clock, sparsity=.8, **kw):
    "(masked model in evaluation mode, `to_fastest` of it, its outputs)"
    sparsify_model(net.eval(), sparsity, **kw)
    with torch.no_grad(): want = net(*deploy.call_args(deepcopy(x))[0])
    return net, to_fastest(net, x)[0], want

def close(a, b): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

@pytest.mark.parametrize('inplace', [True, False])
def test_a_resnet_is_folded_whole(inplace, clock):
    net,x = resnet(relu=nn.ReLU(inplace))
    net,fast,want = faster(net, x, clock, exclude=[0, -1])
    before = snapshot(net)
    table = to_fastest(net, x)[1]
    assert {r.name: r.folds for r in table.rows}=={'4.conv1': 'norm+relu', '4.conv2': 'norm+add+relu', '5.conv1': 'norm+relu', '5.conv2': 'norm+add+relu', '5.downsample.0': 'norm'}
    assert type(fast) is type(net) and isinstance(fast.forward, Folded) and fast.forward.is_fresh()
    kinds = [type(m) for m in fast.forward.graph.modules()]
    assert kinds.count(Fused)==6 and kinds.count(Pool)==1 and nn.BatchNorm2d not in kinds and nn.ReLU not in kinds
    for _ in range(2): close(fast(x), want)
    for n in (1, 3): close(fast(x[:1].repeat(n, 1, 1, 1)), net(x[:1].repeat(n, 1, 1, 1)))              # other batches, other sizes of images
    close(fast(x[:, :, :9]), net(x[:, :, :9]))
    assert fast.forward.is_fresh() and not fast(x).requires_grad
    back = from_fastest(fast)
    assert not changed(before, snapshot(back)) and not is_folded(back) and n_sparse(back)==0
    for a,b in zip(net.modules(), back.modules()): assert type(a) is type(b)
    close(back(x), want)

@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'file', 'bake'])
def test_a_folded_model_can_be_copied(how, clock, tmp_path):
    net,x = resnet()
    net,fast,want = faster(net, x, clock)
    if how=='deepcopy': other = deepcopy(fast)
    if how=='pickle': torch.save(fast, f := io.BytesIO()); f.seek(0); other = torch.load(f, weights_only=False)
    if how=='file': save_sparse(fast, tmp_path/'m'); other,_ = resnet(); load_sparse(tmp_path/'m', other.eval())
    if how=='bake': other = bake(fast)
    close(other(x), want)
    if how in ('deepcopy', 'pickle'):
        assert other.forward.is_fresh() and other.forward.model is other and other.forward.graph.model__8 is other[8]
        with torch.no_grad(): other[4].conv1.values.zero_()
        assert not other.forward.is_fresh() and fast.forward.is_fresh()
        close(fast(x), want)
        assert not is_folded(from_fastest(other)) and is_folded(fast)
    assert not changed(snapshot(net), snapshot(from_fastest(fast)))

def test_what_changes_a_model_ends_folding(clock):
    "The model runs as it is: after a write to a weight, with a hook, with another module, in training mode, where a gradient is wanted"
    net,x = resnet()
    net,fast,want = faster(net, x, clock)
    seen = []
    h = fast[4].bn1.register_forward_hook(lambda *_: seen.append(1))
    close(fast(x), want), h.remove(), fast(x)
    assert len(seen)==1 and fast.forward.is_fresh()
    y = x.clone().requires_grad_()
    fast(y).sum().backward()
    close(y.grad, torch.autograd.functional.jacobian(lambda x: net(x).sum(), x)) or fast.zero_grad()
    head,fast[8] = fast[8],nn.Identity()
    assert fast(x).shape==(2, 24)
    fast[8] = head
    fast.train(), fast(x), fast.eval()
    assert not fast.forward.is_fresh()                                                     # the running statistics moved
    fast,_ = to_fastest(net, x)
    other = deepcopy(net)
    with torch.no_grad(): other[4].bn2.weight.mul_(2), other[5].bn1.running_mean.add_(1)
    fast.load_state_dict(to_fastest(other, x)[0].state_dict())
    close(fast(x), other(x))
    for m in (fast.float(), to_fastest(net, x)[0].float()): assert m(x.float()).dtype==torch.float32

def _assign(m): m.load_state_dict({k: t*1.1 if t.is_floating_point() else t for k,t in m.state_dict().items()}, assign=True)
def _replace_weight(m): m[0].weight = nn.Parameter(m[0].weight*2)
CHANGES = dict(bias=lambda m: m[0].bias.add_(1.), norm=lambda m: m[1].running_mean.add_(1.), scale=lambda m: m[1].weight.mul_(2.), data=lambda m: setattr(m[1].bias, 'data', m[1].bias+1),
               assign=_assign, parameter=_replace_weight, dropout=lambda m: m[3].train(), batch_norm=lambda m: m[1].train())

@pytest.mark.parametrize('change', CHANGES)
@torch.no_grad()
def test_every_change_of_what_was_folded_counts(change):
    "Each tensor of a layer and its batch norm, however it is changed, and training mode of a part"
    net,x = live(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5), nn.Conv2d(8, 4, 1))).eval(),torch.randn(2, 3, 9, 9)
    from sparsefast.ship.fold import fold, unfold
    fold(net, x)
    assert is_folded(net) and net.forward.is_fresh()
    CHANGES[change](net)
    other = unfold(deepcopy(net))
    torch.manual_seed(0); got = net(x)
    torch.manual_seed(0)
    assert torch.equal(got, other(x))
    if change=='dropout': assert net.eval().forward.is_fresh()

@torch.no_grad()
def test_a_folded_model_takes_the_weights_of_a_functional_call():
    from sparsefast.ship.fold import fold, unfold
    net,x = live(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval(),torch.randn(2, 3, 9, 9)
    fold(net, x)
    other = {n: torch.randn_like(p) for n,p in net.named_parameters()}
    got = torch.func.functional_call(net, other, (x,))
    assert net.forward.is_fresh() and torch.equal(got, torch.func.functional_call(unfold(net), other, (x,)))

@pytest.mark.parametrize('norm', [partial(nn.BatchNorm2d, affine=False), partial(nn.BatchNorm2d, eps=.1), partial(nn.BatchNorm2d, track_running_stats=False), nn.InstanceNorm2d])
def test_norms(norm, clock):
    net = live(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())) if not isinstance(norm, partial) or 'track_running_stats' not in norm.keywords \
        else nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU())
    net,fast,want = faster(net.double(), torch.randn(2, 3, 9, 9).double(), clock)
    table = to_fastest(net, torch.randn(2, 3, 9, 9).double())[1]
    tracks = isinstance(net[1], nn.BatchNorm2d) and net[1].track_running_stats
    assert [r.folds for r in table.rows]==['norm+relu' if tracks else '', 'relu']

def test_linear_layers_and_one_dimension(clock):
    "Batch norm of (batch, features), and not of (batch, sequence, features), where channels are the sequence"
    flat = live(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())).double()
    x = torch.randn(4, 6).double()
    _,fast,want = faster(flat, x, clock)
    assert isinstance(fast.forward, Folded) and not close(fast(x), want)
    close(fast(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)).double()), flat(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)).double()))
    deep,x = deepcopy(unsparsify_model(flat)),torch.randn(4, 6, 6).double()
    _,fast,want = faster(deep, x, clock)
    assert not is_folded(fast) and not any(str(find_chain(n)) for n in trace(Call(fast, (x,), {})).graph.nodes)
    close(fast(x), want)
    conv,x = live(nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Dropout(.5), nn.ReLU())).double(),torch.randn(2, 3, 12).double()
    _,fast,want = faster(conv, x, clock)
    assert isinstance(fast.forward, Folded) and not close(fast(x), want)

# name -> (forward of a model with layers a, b, conv-like n and norms, what is folded of a and b)
def adds(self, x): y = self.n(self.a(x)); y += x; return self.b(y)
def adds_to_x(self, x): y = self.a(x); z = x*1.; w = z.view(-1); z += y; return self.b(w.view(x.shape))     # the alias sees it
def adds_method(self, x): return self.b(self.n(self.a(x)).add_(x)).relu_()
def torch_add(self, x): return F.relu(self.b(torch.add(x, F.relu(self.a(x), inplace=True))), True)
def alpha(self, x): return self.b(torch.add(self.a(x), x, alpha=2))
def twice_itself(self, x): y = self.a(x); return self.b(y+y)
def two_users(self, x): y = self.n(self.a(x)); return self.b(torch.relu(y))+y
def before_norm(self, x): return self.n(self.b(torch.relu(self.a(x)))+x)
def broadcast(self, x): return self.b(self.a(x)+x[:1,:,:1])
def number(self, x): return self.b(self.a(x)+1)
def relu_ignored(self, x): y = self.n(self.a(x)); self.relu(y); return self.b(y)
def relu_of_input(self, x): z = x*1.; y = self.a(z); r = z.relu_(); return self.b(y+r)                      # the input of a changes before its chain ends
def writes_between(self, x): z = x*1.; y = self.a(z); z.mul_(2.); return self.b(y+z)
def shared(self, x): return self.b(self.n(self.a(torch.relu(self.a(x)))))
def dropout(self, x): return self.b(torch.relu(F.dropout(self.a(x), .5, self.training))+x)
def relu_then_add(self, x): return self.b(torch.relu(self.n(self.a(x)))+x)
cases = dict(adds=('norm+add', ''), adds_to_x=('', ''), adds_method=('norm+add', 'relu'), torch_add=('relu', 'relu'), alpha=('', ''), twice_itself=('', ''), two_users=('norm', 'add'),
             before_norm=('relu', 'add'), broadcast=('', ''), number=('', ''), relu_ignored=('norm', ''), relu_of_input=('', ''), writes_between=('', ''), shared=('relu', ''),
             dropout=('relu', ''), relu_then_add=('norm+relu', ''))

def chains(net, x):
    "What the graph says of the first calls of layers `a` and `b`"
    found = {}
    for node in trace(Call(net, (x,), {})).graph.nodes: found.setdefault(node.target, str(find_chain(node)))
    return found['model__a'],found['model__b']

@pytest.mark.parametrize('name', cases)
def test_chains(name, clock):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.n,self.relu = nn.Conv2d(4, 4, 3, padding=1),nn.Conv2d(4, 4, 1),nn.BatchNorm2d(4),nn.ReLU(inplace=True)
        forward = globals()[name]
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, 6).double()
    kept = x.clone()
    net,fast,want = faster(live(Net()).double(), x, clock, .5)
    plain = unfold(deepcopy(fast))
    assert chains(plain, x)==cases[name]                                                  # the rules, without the check of outputs that comes after them
    with torch.no_grad(): close(trace(Call(plain, (x,), {})).forward([x.clone()]), want)
    folds = {n: str(c) for n,c in fold(plain, x).items()}
    assert (folds.get('a', ''),folds.get('b', ''))==cases[name] and torch.equal(x, kept)
    for _ in range(2): close(fast(x), want)
    close(fast(x[:1]), net(x[:1]))
    assert not changed(snapshot(net), snapshot(from_fastest(fast)))

def test_an_addition_that_is_broadcast_for_another_batch(clock):
    "A position embedding has the shape of a batch of one"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a,self.p = nn.Linear(6, 8),nn.Parameter(torch.randn(1, 5, 8))
        def forward(self, x): return torch.relu(self.a(x)+self.p)
    x = torch.randn(4, 5, 6).double()
    net,fast,_ = faster(Net().double(), x[:1], clock)
    assert isinstance(fast.forward, Folded)
    close(fast(x), net(x)), close(fast(x[:1]), net(x[:1]))

def test_users_hooks_stay(clock):
    "A module with hooks is called; what is inside a hooked one is folded by itself"
    net,x = resnet()
    seen = []
    h = net[4].bn1.register_forward_hook(lambda m, i, o: seen.append('bn1') or o*2)
    g = net[5].register_forward_pre_hook(lambda m, i: seen.append('block'))
    net,fast,want = faster(net, x, clock)
    seen.clear()
    close(fast(x), want)
    assert seen==['bn1', 'block'] and isinstance(fast.forward, Folded) and isinstance(fast[5].forward, Folded)
    table = to_fastest(net, x)[1]
    assert {r.name: r.folds for r in table.rows if '.conv' in r.name}=={'4.conv1': '', '4.conv2': 'norm+add+relu', '5.conv1': 'norm+relu', '5.conv2': 'norm+add+relu'}
    root,x = resnet()
    root.register_forward_hook(lambda m, i, o: o+1)
    _,fast,want = faster(root, x, clock)
    assert isinstance(fast.forward, Folded)
    close(fast(x), want)

class Untraceable(nn.Module):
    "Looks at numbers"
    def __init__(self, body): super().__init__(); self.body,self.blocks,self.head = body,nn.ModuleList([BasicBlock(16, 16)]),nn.Linear(16, 3)
    def forward(self, x, scale=1., more=None):
        x = self.body(x)
        for b in self.blocks: x = b(x) if x.mean()<1e9 else x
        x = self.head(x.mean((2, 3)))*scale
        return dict(out=x, more=(more, [x]))

def test_a_model_that_cannot_be_traced_is_folded_in_parts(clock):
    net = live(Untraceable(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))).double()
    x = dict(x=torch.randn(2, 3, 8, 8).double(), scale=2.)
    sparsify_model(net.eval(), .8)
    want = net(**x)
    fast,table = to_fastest(net, x)
    assert not isinstance(fast.forward, Folded) and isinstance(fast.body.forward, Folded) and isinstance(fast.blocks[0].forward, Folded)
    assert [r.folds for r in table.rows]==['norm+relu', 'norm+relu', 'norm+add+relu', '']
    got = fast(**x)
    close(got['out'], want['out']), close(got['more'][1], want['more'][1])
    assert not changed(snapshot(net), snapshot(from_fastest(fast)))

class Asks(nn.Module):
    "Depends on training mode, on arguments that are no tensors, and gives a nest"
    def __init__(self): super().__init__(); self.a,self.n = nn.Linear(6, 6),nn.BatchNorm1d(6)
    def forward(self, x, y=None, *, twice=False):
        z = self.n(self.a(x))
        if self.training: z = z*100
        if y is not None: z = z+y['add']
        return (z*2, twice) if twice else (z, {'x': x})

def test_arguments(clock):
    net = live(Asks()).double()
    sparsify_model(net.eval(), .5)
    x,y = torch.randn(3, 6).double(),dict(add=torch.randn(3, 6).double())
    fast,_ = to_fastest(net, (x, y))
    assert isinstance(fast.forward, Folded)
    for args,kw in (((x, y), {}), ((x,), {}), ((x,), dict(y=y)), ((x, y), dict(twice=True)), ((x, None), dict(twice=False))):
        want,got = net(*args, **kw),fast(*args, **kw)
        close(got[0], want[0])
        assert type(got) is type(want) and (got[1]==want[1] if isinstance(want[1], bool) else got[1]['x'] is x)
    fast.train()
    assert fast(x, y)[0].abs().max()>10*fast.eval()(x, y)[0].abs().max()
    other = to_fastest(net, dict(x=x, twice=True))[0]
    assert isinstance(other.forward, Folded) and other(x=x, twice=True)[1] is True
    close(other(x=x)[0], net(x)[0])

@pytest.mark.parametrize('kind', ['counts', 'keeps', 'appends'])
def test_a_model_that_remembers_is_not_traced(kind, clock):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.a,self.n,self.kept,self.all,self.count = nn.Conv2d(3, 4, 1),nn.BatchNorm2d(4),None,[],0
        def forward(self, x):
            y = self.n(self.a(x))
            if kind=='keeps': self.kept = y
            if kind=='appends': self.all.append(y)
            if kind=='counts': self.count += 1
            return y
    x = torch.randn(1, 3, 4, 4)
    sparsify_model(net := Net().eval(), .5)
    fast,_ = to_fastest(net, x)
    assert not is_folded(fast)
    n = fast.count,len(fast.all)
    y = fast(x)
    assert dict(counts=fast.count==n[0]+1, keeps=fast.kept is y, appends=len(fast.all)==n[1]+1 and torch.is_tensor(fast.all[0]))[kind]

def test_a_forward_of_the_users_own_stays(clock):
    net,x = resnet()
    before = net.forward = MethodType(lambda self, x: nn.Sequential.forward(self, x)+1, net)
    sparsify_model(net.eval(), .8, enforce_mask=False)
    fold(net, x)
    assert net.forward is before and isinstance(net[4].forward, Folded)
    unfold(net)
    assert net.forward is before and 'forward' not in net[4].__dict__

@pytest.mark.parametrize('arch', ['resnet18', 'resnetv2_50', 'efficientnet_b0', 'mobilenetv3_small_050', 'vit_tiny_patch16_224', 'convnext_atto', 'mixer_s32_224', 'resnest14d', 'densenet121', 'swin_tiny_patch4_window7_224'])
def test_timm(arch, clock):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    size = dict(img_size=64) if arch.split('_')[0] in ('vit', 'mixer', 'swin') else {}
    net,x = live(timm.create_model(arch, num_classes=3, **size)).double(),torch.randn(2, 3, 64, 64).double()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): nn.init.uniform_(m.weight, .5, 1.)
    before = snapshot(faster(net, x, clock)[0])
    fast,table = to_fastest(net, x)
    with torch.no_grad(): torch.testing.assert_close(fast(x), net(x), rtol=1e-9, atol=1e-10)
    assert is_folded(fast) or arch in ('convnext_atto', 'resnetv2_50')
    if arch=='resnet18': assert {r.folds for r in table.rows}=={'norm', 'norm+relu', 'norm+add+relu', ''}
    assert not changed(before, snapshot(from_fastest(fast)))

def test_huggingface(clock):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30)).double()
    resnet = live(transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))).double()
    for net,x in ((bert, dict(input_ids=torch.randint(30, (2, 7)))), (resnet, dict(pixel_values=torch.randn(1, 3, 32, 32).double()))):
        sparsify_model(net.eval(), .8)
        want = net(**x)
        fast,_ = to_fastest(net, x)
        got = fast(**x)
        assert type(got) is type(want) and is_folded(fast)
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-9)
        assert not changed(snapshot(net), snapshot(from_fastest(fast)))

def test_pooled_images_lie_channel_by_channel_if_images_did():
    x,p = torch.randn(1, 8, 9, 9),nn.MaxPool2d(2)
    by_pixel = x.contiguous(memory_format=torch.channels_last)
    assert Pool(p)(x).is_contiguous() and Pool(p, True)(by_pixel).is_contiguous() and not Pool(p)(by_pixel).is_contiguous()
    for y in (Pool(p)(x), Pool(p, True)(by_pixel), Pool(p)(x[0])[None]): assert torch.equal(y, p(x))

def test_a_norm_in_half_precision_is_computed_in_double():
    conv,norm = nn.Conv2d(3, 4, 1).bfloat16(),live(nn.BatchNorm2d(4)).bfloat16()
    new = fold_norm(conv, norm)
    scale = norm.weight.double()/(norm.running_var.double()+norm.eps).sqrt()
    assert new.weight.dtype==torch.bfloat16 and torch.equal(new.weight, (conv.weight.double()*scale.view(4, 1, 1, 1)).bfloat16())

# ------------------------------------------------------------ bad input
@pytest.mark.parametrize('kw, says', [(dict(forms='csr'), "'csr'"), (dict(forms=['sparse', 'bsr']), 'needs a CUDA device'), (dict(forms='2:4'), 'needs a CUDA device'), (dict(margin=0.9), 'margin'),
                                      (dict(margin=float('nan')), 'margin')])
def test_refused(kw, says, clock):
    model,x = nets()['mlp']
    sparsify_model(model, 0.5)
    with pytest.raises(ValueError, match=says): to_fastest(model, x, **kw)
    assert not clock['calls']

def test_no_masks(clock):
    with pytest.raises(ValueError, match='no masks'): to_fastest(*nets()['mlp'])

def test_a_model_that_differs_each_time(clock):
    class Noise(nn.Module):
        def forward(self, x): return x+torch.randn_like(x)
    model = nn.Sequential(mlp(4, 3, 2), Noise())
    sparsify_model(model, 0.5)
    with pytest.raises(RuntimeError, match='the same twice'): to_fastest(model, torch.randn(2, 4))

# ------------------------------------------------------------ table and clock
def test_table_as_text_and_html():
    rows = [LayerTime('a<b', (3, 4), 0.75, (2, 4), dict(dense=1., sparse=0.25), 'sparse'), LayerTime('c', (5, 3), 0.5, (), {}, 'dense', 'why')]
    t = SpeedTable(rows, dict(dense=2., fast=1., gain=(2., 1.9, 2.1)), 'a machine')
    lines = repr(t).splitlines()
    assert lines[0]=='a machine' and lines[1].split()==['layer','weight','sparsity','input','dense','ms','sparse','ms','form','gain','note']
    assert lines[2].split()==['a<b','3x4','0.750','2x4','1.000','0.250','sparse','4.00x'] and lines[3].split()==['c','5x3','0.500','dense','why']
    assert lines[4].split()==['whole','model','2.000','1.000','sparse','2.00x','(1.90-2.10)'] and lines[4].index('1.000')==lines[2].index('0.250')
    html = t._repr_html_()
    assert html.count('<tr>')==html.count('</tr>')==4 and 'a&lt;b' in html and '<b' not in html.replace('<body', '')

def test_each_column_of_the_table_is_of_one_form():
    "Where layers are in several, the model's time has a column of its own; where all stay dense, it is the dense one's"
    ms,whole = dict(dense=1., sparse=.5, bsr=.25),dict(dense=2., fast=1., gain=(2., 1.9, 2.1))
    rows = [LayerTime(n, (3, 4), .75, (2, 4), ms, form) for n,form in zip('abc', ('sparse', 'bsr', 'dense'))]
    head,*_,last = SpeedTable(rows, whole, 'a machine').cells()
    assert dict(zip(head, last))=={'layer': 'whole model', 'weight': '', 'sparsity': '', 'input': '', 'dense ms': '2.000', 'sparse ms': '', 'bsr ms': '', 'mixed ms': '1.000', 'form': 'mixed', 'gain': '2.00x (1.90-2.10)'}
    head,*_,last = SpeedTable(rows[1:], whole, 'a machine').cells()
    assert dict(zip(head, last))['bsr ms']=='1.000' and last[-2]=='bsr' and 'mixed ms' not in head
    head,*_,last = SpeedTable(rows[2:], {**whole, 'fast': 2.}, 'a machine').cells()
    assert [c for c in last if c]==['whole model', '2.000', 'dense', '2.00x (1.90-2.10)']

def test_paired_times_take_turns():
    order = []
    times = paired_times(dict(a=lambda: order.append('a'), b=lambda: order.append('b')), seconds=0, least=4)
    assert order==list('abab'+'abbaabba') and [len(t) for t in times.values()]==[4, 4] and all(x>=0 for t in times.values() for x in t)

def test_ratio(): assert ratio(dict(a=[2., 4., 9., 8.], b=[1., 2., 3., 2.]), 'a', 'b')==(2.5, 2., 3.)

def test_real_times_are_of_the_functions_they_name():
    "A function that works a hundred times as hard takes longer"
    x = torch.randn(300, 300)
    def work(n):
        for _ in range(n): x@x
    assert ratio(paired_times(dict(a=partial(work, 100), b=partial(work, 1)), seconds=0, least=3), 'a', 'b')[0]>2

def test_processor(): assert processor() and '/' not in processor().split()[0]

# ------------------------------------------------------------ on a GPU
@pytest.mark.parametrize('form', [bsr_form, semi_structured_form])
def test_gpu_forms_say_what_they_need(form):
    m = nn.Linear(64, 64)
    sparsify_model(m, 0.5, pattern_f=nm_pattern)
    with pytest.raises(ValueError, match="needs a CUDA device, and the weight is on cpu"): form(m)
    conv = nn.Conv2d(4, 4, 1)
    sparsify_model(conv, 0.5)
    with pytest.raises(ValueError, match='is for nn.Linear, not Conv2d'): form(conv)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('form, pattern, sparsity', [(bsr_form, partial(block_pattern, size=(32, 32)), 0.8), (semi_structured_form, nm_pattern, 0.5)])
def test_gpu_forms(form, pattern, sparsity):
    m = nn.Linear(256, 128).to('cuda', torch.float16)
    sparsify_model(m, sparsity, pattern_f=pattern)
    f,x = form(m),torch.randn(64, 256, device='cuda', dtype=torch.float16)
    torch.testing.assert_close(f(x), m(x), rtol=1e-2, atol=1e-2)
    back = f.to_masked()
    assert torch.equal(back.weight, m.weight) and torch.equal(back.weight_mask, m.weight_mask)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_to_fastest_on_a_gpu():
    model = mlp(256, 512, 512, 256).to('cuda', torch.float16)
    sparsify_model(model, 0.5, pattern_f=nm_pattern)
    x = torch.randn(1024, 256, device='cuda', dtype=torch.float16)
    fast,table = to_fastest(model, x)
    assert set(table.rows[0].ms)>={'dense','sparse','2:4'} and 'bsr' in table.rows[0].note
    torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert not changed(snapshot(model), snapshot(from_fastest(fast)))
