"to_fastest: what it decides when times are known, that outputs and state stay, and what it refuses. Times themselves are for benchmarks"
import re, warnings
from copy import deepcopy
from functools import partial
import pytest, torch
from torch import nn
from helpers import changed, mlp, snapshot
from sparsefast.ship import deploy
from sparsefast.ship.deploy import LayerTime, SpeedTable, bsr_form, from_fastest, paired_times, processor, ratio, semi_structured_form, to_fastest
from sparsefast.ship.files import load_sparse, save_sparse
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

def test_a_layer_called_twice_counts_twice(clock):
    model,x = nets()['twice']
    sparsify_model(model, 0.5)
    rows = {r.name: r for r in to_fastest(model, x)[1].rows}
    assert rows['a'].ms==dict(dense=2000., sparse=800.) and rows['b'].ms==dict(dense=1000., sparse=400.)

class Block(nn.Module):
    "Two layers with an activation in between, which may ask for rows"
    def __init__(self, view): super().__init__(); self.view,self.a,self.b = view,nn.Linear(32, 64),nn.Linear(64, 32)
    def forward(self, x): return x+self.b(torch.relu(self.a(x).view(len(x), -1) if self.view else self.a(x)).reshape(len(x), -1, 64))

@pytest.mark.parametrize('view', [False, True])
def test_columns_between_sparse_layers(view, clock):
    model,x = Block(view), torch.randn(2, 20, 32)
    sparsify_model(model, .9)
    fast,_ = to_fastest(model, x)
    assert fast.a.columns!=view and not fast.b.columns and n_sparse(fast)==2
    assert torch.allclose(fast(x), model.eval()(x), atol=1e-5)

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
    assert all(r.note=='won alone, not in the model' for r in table.rows)
    gains,wholes = iter([0.5, 0.2, 0.4]),iter([1.5, 0.9])
    fast,table = to_fastest(model, x)
    assert [r.form for r in table.rows]==['dense','sparse','dense'] and isinstance(fast[2], SparseLinear) and type(fast[0]) is nn.Linear and table.gain==1/0.9
    assert not changed(snapshot(model), snapshot(from_fastest(fast)))

def test_nothing_wins(clock):
    clock['sparse'] = 3.
    model,x = nets()['convs']
    sparsify_model(model, 0.5)
    fast,table = to_fastest(model, x)
    assert n_sparse(fast)==0 and table.gain==1. and not changed(snapshot(model), snapshot(fast))

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
    assert [r.note for r in table.rows]==['other layers share its weight'] and fast[0].weight is fast[2].weight

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
    assert lines[0]=='a machine' and lines[1].split()==['layer','weight','sparsity','input','dense','ms','sparse','ms','form','gain']
    assert lines[2].split()==['a<b','3x4','0.750','2x4','1.000','0.250','sparse','4.00x'] and lines[3].split()==['c','5x3','0.500','dense']
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
