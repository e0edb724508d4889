"The doctor finds every planted fault, names the place, and finds nothing in a healthy model, whatever trained it"
import copy, html, re, warnings
from functools import partial
import pytest, torch
from torch import nn
from fastai import optimizer as fo
from sparsefast import presets
from sparsefast.see import mask_checks
from sparsefast.all import *
from sparsefast.see.doctor import Finding, Findings, sparse_doctor
from helpers import *

CATALOGUE = {k.removesuffix('_presets'): v for k,v in vars(presets).items() if k.endswith('_presets')}
def preset_of(name): return {**CATALOGUE[name], 'batches_per_update': 1 if name in ('TopKAST', 'SR_STE', 'Static') else 4, 'replaces_step': False, **({'grad_steps': 4} if name=='SEFT' else {})}

def sick(findings, kind, where=None, severity='fault'):
    "There is this finding, in this place, and it says what to do"
    found = [f for f in findings if f.kind==kind]
    assert found and (where is None or where in [f.where for f in found]) and all(f.severity==severity and f.what and f.todo for f in found), findings
    return found

def made(name='RigL', sizes=(8,24,20,4), sparsity=.5):
    torch.manual_seed(0)
    model,method = mlp(*sizes), DSTMethod(**preset_of(name))
    sparsify_model(model, sparsity, **method.start(sparsity))
    return model,method,torch.optim.SGD(model.parameters(), lr=.05, momentum=.9, weight_decay=.01)

# ------------------------------------------------------------ healthy
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', CATALOGUE)
def test_every_method_leaves_a_healthy_model(name):
    model,method,opt = made(name)
    assert sparse_doctor(model, opt, method)==[]
    for step,(x,y) in enumerate(batches(40, n_out=4), 1):
        backward(model, x, y)
        method.step(model, opt, step, (step-1)/40)
        if step in (7, 20, 40): assert sparse_doctor(model, opt, method)==[], step
    assert sparse_doctor(model, method=CATALOGUE[name])==[] and sparse_doctor(model).healthy

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['SET', 'SNFS', 'RigL', 'SRigL', 'TopKAST', 'GMP'])
def test_a_learner_before_while_and_after(name):
    torch.manual_seed(0)
    preset = {**preset_of(name), 'batches_per_update': 4 if name!='TopKAST' else 1}
    learn = learner(mlp(8,24,20,4), opt_func=partial(fo.SGD, mom=.9)).sparsify(.5, preset=preset)
    seen = []
    learn.add_cb(DynamicSparseTrainingCallback(**preset)).add_cb(Watch('after_step', lambda l: seen.extend(l.sparse_doctor())))
    learn.fit(3)
    assert seen==[] and learn.sparse_doctor()==[] and sparse_doctor(learn)==[]

@pytest.mark.parametrize('model', [lambda: nn.LSTM(6, 5), lambda: nn.TransformerEncoderLayer(16, 2, 32), lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 3, groups=2)),
                                   lambda: nn.Bilinear(6, 5, 4)], ids=['lstm', 'transformer', 'conv', 'bilinear'])
def test_other_layers_are_healthy(model):
    torch.manual_seed(0)
    sparsify_model(m := model(), .5)
    assert sparse_doctor(m)==[] and sparse_doctor(copy.deepcopy(m))==[] and sparse_doctor(torch.compile(m))==[]

@pytest.mark.parametrize('opt', ['adamw', 'nesterov', 'rmsprop'])
def test_torch_optimizers_in_fastai(opt):
    learn = learner(opt_func=wrapped(TORCH_OPTS[opt]), cbs=DynamicSparseTrainingCallback(**{**SET_presets, 'batches_per_update': 4}))
    learn.fit(2)
    assert learn.sparse_doctor()==[]

def test_lookahead():
    learn = learner(opt_func=fo.ranger, cbs=DynamicSparseTrainingCallback(**{**SET_presets, 'batches_per_update': 4}))
    learn.fit(2)
    assert learn.sparse_doctor()==[]

def test_patterns_are_healthy_without_a_method():
    for f in (fan_in_pattern, nm_pattern, block_pattern):
        sparsify_model(m := mlp(16, 24, 20, 4), .55, pattern_f=f)
        assert sparse_doctor(m)==[]

# ------------------------------------------------------------ planted faults
def test_no_mask():
    sick(sparse_doctor(nn.Linear(3, 3)), 'no mask', 'Linear')
    assert not sparse_doctor(nn.Linear(3, 3)).healthy

def test_dtype():
    model,*_ = made()
    model[2]._buffers['weight_mask'] = model[2].weight_mask.float()
    sick(sparse_doctor(model), 'dtype', '2.weight')

def test_shape_after_a_replaced_parameter():
    model,*_ = made()
    model[2].weight = nn.Parameter(torch.randn(7, 24))
    sick(sparse_doctor(model), 'shape', '2.weight')

def test_device():
    model,*_ = made()
    model[2]._buffers['weight_mask'] = model[2].weight_mask.to('meta')
    sick(sparse_doctor(model), 'device', '2.weight')

def test_orphan():
    model,*_ = made()
    nn.utils.parametrizations.weight_norm(model[2])
    sick(sparse_doctor(model), 'orphan', '2.weight')

def test_a_mask_that_is_gone():
    model,*_ = made()
    del model[2].weight_mask
    f = sick(sparse_doctor(model), 'lost mask', '2.weight')
    assert len(f)==1 and sparse_doctor(model).kinds==['lost mask']
    add_mask(model[2], 'weight', model[2].weight!=0, model[2].weight_sparsity)                          # what the finding says helps
    assert sparse_doctor(model)==[]
    del model[2].weight_mask, model[2].weight_sparsity
    assert sparse_doctor(model)==[]

def test_a_buffer_of_that_name_beside_no_parameter_is_nobody_s_target():
    model,*_ = made()
    model.register_buffer('act_sparsity', torch.tensor(.5))
    assert sparse_doctor(model)==[]

def test_a_count_below_the_target():
    model,method,_ = made()
    i = model[2].weight_mask.nonzero()[0]
    model[2].weight_mask[tuple(i)] = False
    apply_masks(model)
    for m in (method, None): sick(sparse_doctor(model, method=m), 'count', '2.weight')

def test_a_count_above_the_target():
    model,method,_ = made()
    model[2].weight_mask[tuple((~model[2].weight_mask).nonzero()[0])] = True
    sick(sparse_doctor(model, method=method), 'count', '2.weight')
    sick(sparse_doctor(model), 'count', '2.weight', severity='note')
    assert sparse_doctor(model).healthy and sparse_doctor(model, method=CATALOGUE['GMP'])==[]          # a method that prunes is on its way

def test_moved_weights_are_a_fault_unless_the_method_moves_them():
    model,method,_ = made()
    for l,to in ((0, False), (2, True)):
        mask = model[l].weight_mask
        mask[tuple((mask if not to else ~mask).nonzero()[0])] = to
    apply_masks(model)
    assert len(sick(sparse_doctor(model, method=method), 'count'))==2
    assert sparse_doctor(model, method=CATALOGUE['SNFS'])==[] and sparse_doctor(model)==[]

@pytest.mark.parametrize('value', [float('nan'), 1.5, -.1])
def test_target(value):
    model,*_ = made()
    model[2].weight_sparsity.fill_(value)
    sick(sparse_doctor(model), 'target', '2.weight')

def test_empty():
    model,*_ = made()
    model[2].weight_mask.zero_()
    apply_masks(model)
    sick(sparse_doctor(model), 'empty layer', '2.weight', 'warning')

def test_dead_outputs():
    model,*_ = made()
    rows = model[0].weight_mask
    rows[:13] = False
    rows[13:].view(-1)[:] = True
    apply_masks(model)
    found = sick(sparse_doctor(model), 'dead outputs', '0.weight', severity='warning')
    assert '13 of 24' in found[0].what and 'dead outputs' not in sparse_doctor(model, max_dead=.6).kinds

def test_a_class_that_nothing_leads_to():
    model,*_ = made()
    model[4].weight_mask[2] = False
    apply_masks(model)
    found = sick(sparse_doctor(model), 'dead outputs', '4.weight', severity='warning')
    assert '1 of 4' in found[0].what and 'last' in found[0].what

def test_a_budget_that_one_layer_eats():
    model = mlp(100, 100, 10)
    sparsify_model(model, .5, sparsities={'2': .1})
    assert sparse_doctor(model)==[]
    sparsify_model(unsparsify_model(model), .9, sparsities={'2': .1})
    found = sick(sparse_doctor(model), 'budget', '2.weight', severity='warning')
    assert len(found)==1 and '%' in found[0].what

@pytest.mark.parametrize('sizes,sparsity,own,sick_at', [((100,100,43), .7073, {'0': .99, '2': .05}, '2.weight'),     # three tenths of the weights
                                                        ((100,100,100), .5, {'0': .95}, '2.weight'),                 # half of them, twenty times as dense
                                                        ((100,100,100), .5, {'0': .85}, None),                       # six times
                                                        ((64,100,100,10), .6384, {'0': .02, '2': .999, '4': .99}, '0.weight')])
def test_a_budget_that_a_large_layer_eats(sizes, sparsity, own, sick_at):
    sparsify_model(model := mlp(*sizes), sparsity, sparsities=own)
    assert [f.where for f in sparse_doctor(model) if f.kind=='budget']==[sick_at]*bool(sick_at)

def test_one_layer_has_its_own_budget():
    sparsify_model(model := mlp(40, 30), .5)
    assert sparse_doctor(model)==[]

def test_a_budget_is_not_that_of_empty_layers():
    model,*_ = made(sizes=(64,100,50,10), sparsity=.8)
    model[2].weight_mask.zero_()
    apply_masks(model)
    assert 'budget' not in sparse_doctor(model).kinds

@pytest.mark.parametrize('sparsities', [dict(), {'0': .5, '2': .9}], ids=['uniform', 'own'])
def test_a_target_that_its_buffer_cannot_hold_is_no_fault(sparsities):
    "As in layers of 2^25 weights in single precision"
    sparsify_model(model := mlp(200, 200, 200), .777 if not sparsities else .7, sparsities=sparsities)
    model[0]._buffers['weight_sparsity'] = torch.tensor(.777 if not sparsities else .5).half()
    d = int(model[0].weight_mask.sum())-round((1-float(model[0].weight_sparsity))*40000)
    assert (d!=0)==(not sparsities) and sparse_doctor(model)==[] and sparse_doctor(model, method=CATALOGUE['SET'])==[] and sparse_doctor(model, method=CATALOGUE['SNFS'])==[]
    off = (model[0].weight_mask.nonzero()[:100]).unbind(1)
    model[0].weight_mask[off] = False                                                                  # more than digits explain
    apply_masks(model)
    for method in (None, CATALOGUE['SET'], CATALOGUE['SNFS']): sick(sparse_doctor(model, method=method), 'count', '0.weight')

def test_a_total_is_kept_to_what_buffers_can_hold():
    "A method that moves weights moved some into a layer whose target is rounded"
    sparsify_model(model := mlp(200, 200, 200, 200), .777)
    for i in (0, 2): model[i]._buffers['weight_sparsity'] = torch.tensor(.777).half()
    for i,to in ((0, False), (2, True)): model[i].weight_mask[(model[i].weight_mask!=to).nonzero()[:100].unbind(1)] = to
    apply_masks(model)
    assert sparse_doctor(model, method=CATALOGUE['SNFS'])==[] and len(sick(sparse_doctor(model, method=CATALOGUE['SET']), 'count'))==2

def test_a_target_in_half_precision_is_a_fault_where_a_method_needs_it():
    sparsify_model(model := mlp(33, 17, 5), .777)
    model.half()
    assert sparse_doctor(model)==[] and sparse_doctor(model, method=CATALOGUE['RigL'])==[]
    assert 'float16' in sick(sparse_doctor(model, method=CATALOGUE['GMP']), 'target', '0.weight')[0].what

def test_a_target_that_half_precision_has_by_chance_is_no_fault():
    sparsify_model(model := mlp(64, 256, 33), .777)
    model[0].weight_sparsity.fill_(877/1024)
    assert not [f for f in sparse_doctor(model, method=CATALOGUE['GMP']) if f.kind=='target']
    half = float(torch.tensor(.777).half())
    model[2].weight_sparsity.fill_(half)                           # all have been rounded
    assert len(sick(sparse_doctor(model, method=CATALOGUE['GMP']), 'target'))==2
    sparsify_model(model := mlp(201, 203, 5), .777)
    model[0].weight_sparsity.fill_(half)                           # no share of 40,803 weights: not by chance, though the other does not fit
    assert [f.where for f in sick(sparse_doctor(model, method=CATALOGUE['GMP']), 'target')]==['0.weight']

def test_masked_weights():
    model,*_ = made()
    with torch.no_grad(): model[2].weight[~model[2].weight_mask] = .1
    assert f'{int((~model[2].weight_mask).sum())} masked' in sick(sparse_doctor(model), 'masked weights', '2.weight')[0].what

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_not_finite(value):
    model,*_ = made()
    with torch.no_grad(): model[2].weight[tuple(model[2].weight_mask.nonzero()[0])] = value
    sick(sparse_doctor(model), 'not finite', '2.weight')

def test_replaced_by_one_that_the_optimizer_does_not_know():
    model,_,opt = made()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    f = sparse_doctor(model, opt)
    sick(f, 'unknown to optimizer', '2.weight', severity='warning'), sick(f, 'foreign parameters', 'SGD', severity='warning')

@pytest.mark.parametrize('opt_f', [partial(fo.SGD, mom=.9), fo.Adam, wrapped(TORCH_OPTS['adamw'])], ids=['sgd', 'adam', 'adamw'])
def test_unknown_to_the_optimizers_of_fastai(opt_f):
    learn = learner(opt_func=opt_f)
    learn.fit(1)
    learn.model[2].weight = nn.Parameter(learn.model[2].weight.detach().clone())
    sick(learn.sparse_doctor(), 'unknown to optimizer', '2.weight', severity='warning')

def trained(name='RigL'):
    model,method,opt = made(name)
    for step,(x,y) in enumerate(batches(10, n_out=4), 1):
        backward(model, x, y)
        method.step(model, opt, step, (step-1)/10)
    return model,method,opt

def test_state():
    model,method,opt = trained()
    opt.state[model[2].weight]['momentum_buffer'][~model[2].weight_mask] = 1e-3
    for m in (method, None): sick(sparse_doctor(model, opt, m), 'state', '2.weight')
    assert sparse_doctor(model, opt, CATALOGUE['SNFS'])==[]
    method.enforce(model, opt)                                                                         # what the finding says helps
    assert sparse_doctor(model, opt, method)==[]

def test_state_that_is_dense_throughout_may_be_meant():
    model,method,opt = trained('SNFS')
    assert sparse_doctor(model, opt, method)==[]
    sick(f := sparse_doctor(model, opt), 'state', severity='note')
    assert f.healthy
    sick(sparse_doctor(model, opt, CATALOGUE['SET']), 'state')

@pytest.mark.parametrize('where', [0, 2])
def test_hooks(where):
    model,*_ = made()
    model[where]._forward_pre_hooks.clear()
    sick(sparse_doctor(model), 'hook', str(where), severity='warning')
    enforce_masks(model)
    assert sparse_doctor(model)==[]

def test_hooks_of_parents_that_use_a_weight():
    "Attention uses its output projection's weight without calling the layer"
    attn = nn.MultiheadAttention(8, 2)
    sparsify_model(attn, .5)
    assert sparse_doctor(attn)==[]
    attn._forward_pre_hooks.popitem()
    sick(sparse_doctor(attn), 'hook', 'MultiheadAttention', severity='warning')

def test_no_hooks_at_all():
    model = mlp(8, 24, 4)
    sparsify_model(model, .5, enforce_mask=False)
    assert {f.where for f in sick(sparse_doctor(model), 'hook', severity='warning')}=={'0', '2', 'Sequential'}

def tied():
    model = nn.ModuleDict(dict(a=nn.Linear(6, 6), b=nn.Linear(6, 6)))
    model.b.weight = model.a.weight
    sparsify_model(model, .5)
    return model

def test_tied():
    model = tied()
    assert sparse_doctor(model)==[]
    model.b.register_buffer('weight_mask', model.a.weight_mask.clone())
    assert 'tied' not in sparse_doctor(model).kinds                                                    # two, but alike
    model.b.weight_mask.logical_not_()
    sick(sparse_doctor(model), 'tied', 'b.weight')

def test_frozen():
    learn = learner()
    learn.model[0].weight.requires_grad_(False)
    assert sick(f := learn.sparse_doctor(), 'frozen', '0.weight', severity='note') and f.healthy and len(f)==1

def test_pattern():
    model,method,_ = made('SRigL')
    mask = model[2].weight_mask
    on,off = mask[0].nonzero()[0], (~mask[1]).nonzero()[0]
    mask[0,on],mask[1,off] = False,True
    apply_masks(model)
    sick(sparse_doctor(model, method=method), 'pattern', '2.weight')
    assert 'pattern' not in sparse_doctor(model, method=CATALOGUE['RigL']).kinds

def test_store():
    model,*_ = made()
    sick(sparse_doctor(model, method=CATALOGUE['TopKAST']), 'store', '0.weight')

def test_momentum():
    model,*_ = made()
    sick(sparse_doctor(model, torch.optim.SGD(model.parameters(), lr=.1), CATALOGUE['SNFS']), 'no momentum', 'SGD')

def test_ranks(monkeypatch):
    "Two processes, the other of which has another mask (the real thing is in test_ranks)"
    model,*_ = made()
    other = {n: m.clone() for n,m in [('0.weight', model[0].weight_mask), ('2.weight', ~model[2].weight_mask), ('4.weight', model[4].weight_mask)]}
    monkeypatch.setattr(mask_checks.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(mask_checks.dist, 'get_world_size', lambda: 2)
    def gather(out, mine): out[:] = [mine, other]
    monkeypatch.setattr(mask_checks.dist, 'all_gather_object', gather)
    f = sick(sparse_doctor(model), 'ranks', '2.weight')
    assert len(f)==1 and 'rank 1' in f[0].what

# ------------------------------------------------------------ compressed layers
def stored(name='RigL', only=None, opt=True, steps=0):
    "All layers stored, or only these"
    model,method,o = made(name)
    to_sparse_layers(model, o if opt else None, least=0.)
    for i in [i for i in (0, 2, 4) if only is not None and i not in only]: model[i] = model[i].to_masked()
    if only is not None: o = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    for step,(x,y) in enumerate(batches(steps, n_out=4), 1):
        backward(model, x, y)
        method.step(model, o, step, (step-1)/steps)
    return model,method,o

some = pytest.mark.parametrize('only', [None, (0,), (2, 4)], ids=['all', 'first', 'others'])
@some
def test_stored_layers_are_healthy(only):
    model,method,opt = stored(only=only, steps=10)
    assert sparse_doctor(model, opt, method)==sparse_doctor(model, opt)==sparse_doctor(torch.compile(model), opt)==sparse_doctor(copy.deepcopy(model))==[]

@some
def test_stored_layers_that_the_optimizer_does_not_know(only):
    model,method,_ = stored(only=only)
    f = sparse_doctor(model, torch.optim.SGD(mlp(8,24,20,4).parameters(), lr=.1), method)
    assert [x.where for x in sick(f, 'unknown to optimizer', severity='warning')]==['0.weight', '2.weight', '4.weight']
    sick(f, 'foreign parameters', 'SGD', severity='warning')

def test_a_conversion_that_the_optimizer_was_not_told_of():
    model,method,opt = stored(opt=False)
    f = sparse_doctor(model, opt, method)
    assert len(sick(f, 'unknown to optimizer', '2.weight', severity='warning'))==3 and 'to_sparse_layers(model, opt)' in f[0].todo and '3 parameters' in sick(f, 'foreign parameters', severity='warning')[0].what
    learn = learner(sparse_mlp(.8))
    learn.fit(1)
    to_sparse_layers(learn.model, least=0.)
    sick(learn.sparse_doctor(), 'unknown to optimizer', '0.weight', severity='warning')

def test_frozen_values_need_no_optimizer():
    model,method,_ = stored()
    for p in model[0].parameters(): p.requires_grad_(False)
    assert sparse_doctor(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1), method).kinds==['frozen']

def test_state_in_layers_that_stayed_masked():
    model,method,opt = stored(only=(0,), steps=10)
    opt.state[model[2].weight]['momentum_buffer'][~model[2].weight_mask] = 1.
    assert len(sick(sparse_doctor(model, opt, method), 'state', '2.weight'))==1

def flip(m): m.col[:2] = m.col[:2].flip(0)
def replaced(m): m.values = nn.Parameter(m.values[:-1].detach().clone())
@pytest.mark.parametrize('ill,what', [(lambda m: m.col.__setitem__(0, 99), 'from 0 to 7'), (flip, 'must rise'), (replaced, r'\d+ columns'), (lambda m: setattr(m, 'crow', m.crow.to('meta')), 'meta'),
                                      (lambda m: setattr(m, 'col', None), 'col missing'), (lambda m: m.crow.__setitem__(1, 999), 'row starts')], ids=['column', 'order', 'values', 'device', 'missing', 'rows'])
def test_an_index_that_is_none(ill, what):
    model,method,opt = stored()
    good = copy.deepcopy(model.state_dict())
    ill(model[0])
    found = sick(f := sparse_doctor(model, opt, method), 'index', '0.weight')
    assert len(found)==1 and re.search(what, found[0].what) and {x.where for x in f} <= {'0.weight', 'SGD'}
    if what not in ('meta', 'col missing'):
        model.load_state_dict(good)                                                                    # what the finding says helps
        assert 'index' not in sparse_doctor(model, opt, method).kinds

def test_others_are_looked_at_beside_a_broken_index():
    model,*_ = stored()
    model[0].col[0] = 99
    with torch.no_grad(): model[2].values[0] = float('nan')
    f = sparse_doctor(model)
    sick(f, 'index', '0.weight'), sick(f, 'not finite', '2.weight')

def test_a_method_that_stored_layers_cannot_serve():
    for name,why in (('SNFS', 'momentum'), ('TopKAST', 'outside the masks')):
        model,_,opt = stored()
        found = sick(f := sparse_doctor(model, opt, CATALOGUE[name]), 'storage', '0.weight')
        assert len(f)==1 and why in found[0].what and 'to_masked_layers(model, opt)' in found[0].todo and f.kinds==['storage']
        with pytest.raises(ValueError, match='to_masked_layers'): DSTMethod(**preset_of(name)).check(model, opt)

def test_values_that_are_kept_are_missed_in_masked_layers_only():
    model,_,opt = stored(only=(0,))
    assert [x.where for x in sick(sparse_doctor(model, opt, CATALOGUE['TopKAST']), 'store')]==['2.weight', '4.weight']

def test_a_single_stored_layer():
    sparsify_model(m := nn.Linear(8, 6), .5)
    m = SparseLinear.from_masked(m)
    assert sparse_doctor(m, torch.optim.SGD(m.parameters(), lr=.1))==[]
    m.col[0] = 99
    sick(sparse_doctor(m), 'index', 'weight')

def test_nothing_changes_in_stored_layers():
    model,method,opt = stored(steps=10)
    before,held = snapshot(model, opt),[id(m) for m in model.modules()]
    sparse_doctor(model, opt, method)
    assert not changed(before, snapshot(model, opt)) and held==[id(m) for m in model.modules()]

# ------------------------------------------------------------ the report
def test_gravest_first_and_forms():
    model,method,opt = made()
    model[2].weight_mask.zero_()
    model[0].weight.requires_grad_(False)
    model[0]._forward_pre_hooks.clear()
    f = sparse_doctor(model, opt, method)
    assert [x.severity for x in f]==sorted((x.severity for x in f), key=['fault', 'warning', 'note'].index) and len({x.severity for x in f})==3 and not f.healthy
    text,page = repr(f), html.unescape(f._repr_html_())
    assert all(x.where in text and x.what in text and x.todo in text and x.what in page and x.todo in page for x in f)
    assert repr(Findings())=='healthy: no findings' and 'no findings' in Findings()._repr_html_() and Findings().healthy

def test_nothing_changes():
    model,method,opt = trained()
    rng,before = torch.get_rng_state(), snapshot(model, opt)
    with torch.no_grad(): model[2].weight[~model[2].weight_mask] = 1.                                  # sick, and left so
    before = snapshot(model, opt)
    sparse_doctor(model, opt, method)
    assert not changed(before, snapshot(model, opt)) and torch.equal(rng, torch.get_rng_state())

def test_an_unknown_setting_of_a_method_is_refused():
    with pytest.raises(TypeError, match='did you mean'): sparse_doctor(made()[0], method=dict(stop_pc=.5))

def test_what_is_no_model_no_optimizer_no_method_is_refused():
    model,method,opt = made()
    with pytest.raises(TypeError, match='a module or a Learner, got 3'): sparse_doctor(3)
    with pytest.raises(TypeError, match='by `method=`'): sparse_doctor(model, CATALOGUE['RigL'])
    with pytest.raises(TypeError, match="preset, got 'RigL'"): sparse_doctor(model, opt, 'RigL')
    for bad in (1.5, 'half', None):
        with pytest.raises(ValueError, match='max_dead'): sparse_doctor(model, max_dead=bad)
