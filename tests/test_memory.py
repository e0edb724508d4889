"What methods remember between steps: beside the parameter, saved with the optimizer, and no part of the model"
import copy, io
from functools import partial
from types import SimpleNamespace
import pytest, torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
import fastai.optimizer as fo
from fastai.optimizer import OptimWrapper
import sparsefast.presets as presets
from helpers import *
from sparsefast.attach import attach
from sparsefast.average import follow_masks
from sparsefast.memory import Remembers, clear_memory, memory, memory_name, remembered
from sparsefast.methods import DSTMethod
from sparsefast.ship.files import load_sparse, save_sparse
from sparsefast.sparsify import load_sparse_state, unsparsify_model
from sparsefast.storage import to_masked_layers, to_sparse_layers

pytestmark = pytest.mark.filterwarnings('ignore')
METHODS = {n.removesuffix('_presets'): p for n,p in vars(presets).items() if n.endswith('_presets')}
REMEMBER,EVERY,TOTAL = ['RigL_avg', 'SEFT', 'DSR', 'TopKAST'],6,24

def method_of(name, **kw):
    settings = {**METHODS[name], 'batches_per_update': EVERY, **kw}
    if settings.get('grad_steps', 1) not in (1, None): settings['grad_steps'] = 4
    return DSTMethod(**settings)

def made(name, seed=0, dtype=None, **kw):
    torch.manual_seed(seed)
    model,method = mlp(8, 24, 20, 3, dtype=dtype),method_of(name, **kw)
    sparsify_model(model, .5, **method.start(.5))
    return model,method

def run(model, opt, method, steps, look=lambda step: None, dtype=None):
    data = batches(TOTAL, dtype=dtype)
    for step in steps:
        backward(model, *data[step-1])
        method.step(model, opt, step, total=TOTAL)
        look(step)

def all_remembered(model): return {(n, k): t for n,p in model.named_parameters() for k,t in remembered(p).items()}

# ------------------------------------------------------------ the model stays as it is
@pytest.mark.parametrize('name', METHODS)
def test_the_keys_of_a_state_stay(name):
    "And the number and order of buffers, also in the middle of an interval"
    model,method = made(name)
    opt = TORCH_OPTS['adamw'](model.parameters())
    first,buffers,met = list(model.state_dict()),[n for n,_ in model.named_buffers()],set()
    def look(step):
        assert list(model.state_dict())==first and [n for n,_ in model.named_buffers()]==buffers
        met.update(k for _,k in all_remembered(model))
    run(model, opt, method, range(1, TOTAL+1), look)
    assert met<=set(method.remembers) and (met or name not in REMEMBER)              # what shares drops out may remember nothing

def test_who_remembers():
    assert {n for n in METHODS if method_of(n).remembers}>=set(REMEMBER) and not any(method_of(n).remembers for n in ('RigL', 'SET', 'SNFS', 'GMP', 'Static'))

D = .8
def timm_pairs(average, model):
    "As timm does it: all entries of the state in their order, or parameters and buffers"
    with torch.no_grad():
        for a,b in zip(average.state_dict().values(), model.state_dict().values(), strict=True): a.copy_(D*a+(1-D)*b if a.is_floating_point() else b)
def timm_v3(average, model):
    with torch.no_grad():
        for a,b in zip(average.parameters(), model.parameters(), strict=True): a.lerp_(b, 1-D)
        for a,b in zip(average.buffers(), model.buffers(), strict=True): a.copy_(b)
RULES = dict(torch=(partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(D), use_buffers=True), lambda a, m: a.update_parameters(m)),
             v2=(copy.deepcopy, timm_pairs), v3=(copy.deepcopy, timm_v3))

@pytest.mark.parametrize('since', [0, 1, 4, EVERY], ids=['before training', 'step 1', 'between updates', 'update'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('name', REMEMBER)
def test_averages_pair_up_buffers(name, rule, since):
    make,update = RULES[rule]
    model,method = made(name)
    opt,average = torch.optim.SGD(model.parameters(), lr=.2, momentum=.9),[]
    def start(): average.append(follow_masks(make(model), model))
    def look(step):
        if average: update(average[0], model)
        if step==since: start()
    if not since: start()
    first = masks(model)
    run(model, opt, method, range(1, TOTAL+1), look)
    net = getattr(average[0], 'module', average[0])
    assert same_masks(masks(net), masks(model)) and not same_masks(first, masks(model)) and nnz(net)==nnz(model)
    assert [n for n,_ in net.named_buffers()]==[n for n,_ in model.named_buffers()] and not all_remembered(net)

# ------------------------------------------------------------ resumed from model and optimizer
def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)

OPTS = dict(sgd=TORCH_OPTS['sgd'], momentum=TORCH_OPTS['momentum'], adamw=TORCH_OPTS['adamw'], rmsprop=TORCH_OPTS['rmsprop'],
            foreach=partial(torch.optim.AdamW, lr=1e-2, foreach=True), fused=partial(torch.optim.AdamW, lr=1e-2, fused=True),
            fastai=lambda ps: fo.Adam([list(ps)], lr=1e-2), lookahead=lambda ps: fo.Lookahead(fo.Adam([list(ps)], lr=1e-2), k=3),
            wrapped=lambda ps: OptimWrapper(list(ps), torch.optim.AdamW, lr=1e-2))

def resumed(name, opt_f, at, before, dtype=None, convert=lambda method, model, opt: None):
    "(model, optimizer) of a run without and with a break after step `at`; `before`: what is done before the states are loaded"
    out = []
    for stops in (False, True):
        model,method = made(name, dtype=dtype)
        opt = opt_f(model.parameters())
        convert(method, model, opt)
        run(model, opt, method, range(1, at+1), dtype=dtype)
        if stops:
            states = [through_file(o.state_dict()) for o in (model, opt)] if not hasattr(opt, 'param_lists') else [copy.deepcopy(o.state_dict()) for o in (model, opt)]
            model,method = made(name, seed=1, dtype=dtype)
            opt = opt_f(model.parameters())
            convert(method, model, opt)
            before(method, model, opt)
            model.load_state_dict(states[0])
            opt.load_state_dict(states[1])
        run(model, opt, method, range(at+1, TOTAL+1), dtype=dtype)
        out.append((model, opt))
    return out

BEFORE = dict(nothing=lambda method, model, opt: None, enforced=lambda method, model, opt: method.enforce(model, opt))

@pytest.mark.parametrize('opt,before,at', [*((opt, 'nothing', 15) for opt in OPTS), ('adamw', 'enforced', 15), ('sgd', 'enforced', 15), ('fastai', 'enforced', 15), ('adamw', 'nothing', 4), ('adamw', 'nothing', EVERY)])
@pytest.mark.parametrize('name', REMEMBER)
def test_a_run_goes_on_from_model_and_optimizer(name, opt, before, at):
    a,b = resumed(name, OPTS[opt], at, BEFORE[before])
    assert not changed(snapshot(*a), snapshot(*b))

@pytest.mark.parametrize('before', BEFORE)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', REMEMBER)
def test_sums_keep_their_precision(name, dtype, before):
    "torch converts an optimizer's state to the type of the weight, and sums are wider"
    a,b = resumed(name, OPTS['adamw'], 15, BEFORE[before], dtype)
    assert not changed(snapshot(*a), snapshot(*b))

def compressed(method, model, opt):
    to_sparse_layers(model, opt, least=0.)
    method.enforce(model, opt)

@pytest.mark.parametrize('before', BEFORE)
@pytest.mark.parametrize('name', ['RigL_avg', 'DSR'])
def test_a_compressed_run_goes_on(name, before):
    a,b = resumed(name, OPTS['adamw'], 15, BEFORE[before], convert=compressed)
    assert not changed(snapshot(*a), snapshot(*b))

def test_without_what_is_remembered_the_run_is_another():
    "What the tests above compare does depend on it"
    def forget(model, opt):
        for p in model.parameters(): clear_memory(p)
    for name in REMEMBER:
        out = []
        for f in (lambda *args: None, forget):
            model,method = made(name)
            opt = OPTS['momentum'](model.parameters())
            run(model, opt, method, range(1, 16))
            f(model, opt)
            run(model, opt, method, range(16, TOTAL+1))
            out.append(snapshot(model, opt))
        assert changed(*out), name

@pytest.mark.parametrize('order', ['model first', 'optimizer first'])
def test_either_order_of_loading(order):
    model,method = made('RigL_avg')
    opt = OPTS['adamw'](model.parameters())
    run(model, opt, method, range(1, 5))
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    again,_ = made('RigL_avg', seed=1)
    other = OPTS['adamw'](again.parameters())
    method.enforce(again, other)
    if order=='model first': load_sparse_state(again, states[0])
    other.load_state_dict(states[1])
    if order!='model first': load_sparse_state(again, states[0])
    for net,o in ((model, opt), (again, other)): run(net, o, method, range(5, TOTAL+1))
    assert not changed(snapshot(model, opt), snapshot(again, other))

@pytest.mark.parametrize('opt', OPTS)
def test_nothing_is_left_in_the_optimizer(opt):
    "A state has the same entries at every step; the optimizer itself has none of them, or one dict if it is fastai's"
    model,method = made('RigL_avg')
    o = OPTS[opt](model.parameters())
    method.enforce(model, o)
    inner,seen = inner_opt(o),[]
    def look(step):
        if hasattr(inner, 'param_lists'): return
        assert not any('sparsefast' in str(k) for entry in [*inner.state.values(), *inner.param_groups] for k in entry)
        seen.append({i: {k: (t.dtype, t.shape) for k,t in known.items()} for i,known in o.state_dict()['param_groups'][0]['sparsefast_memory'].items()})
    look(0)
    run(model, o, method, range(1, 15), look)
    o.load_state_dict(copy.deepcopy(o.state_dict()))
    look(15)
    assert all(s==seen[0] for s in seen) and (hasattr(inner, 'param_lists') or [*seen[0]]==['0', '2', '4'])

def test_an_optimizer_that_did_not_know_a_method():
    "A state of another method, or of none, loads; so does one with memory into an optimizer without a method"
    model,method = made('RigL_avg')
    opt = OPTS['adamw'](model.parameters())
    run(model, opt, method, range(1, 5))
    plain = OPTS['adamw'](model.parameters())
    plain.load_state_dict(opt.state_dict())
    backward(model, *batches(1)[0])
    plain.step()
    dense = OPTS['adamw'](model.parameters())
    backward(model, *batches(1)[0])
    dense.step()
    opt.load_state_dict(dense.state_dict())
    run(model, opt, method, range(5, 15))
    assert masked_are_zero(model)

def test_attached_and_loaded_by_torch_distributed_checkpoint(tmp_path):
    "One process, whole weights"
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    for opt_f in (OPTS['adamw'], OPTS['sgd']):
        def steps(model, opt, some):
            for x,y in batches(TOTAL)[some]: opt.zero_grad(); nn.functional.cross_entropy(model(x), y).backward(); opt.step()
        (model,method),(again,_) = made('RigL_avg'),made('RigL_avg', seed=1)
        opt,other = opt_f(model.parameters()),opt_f(again.parameters())
        a,b = attach(method, model, opt, TOTAL),attach(method, again, other, TOTAL)
        steps(model, opt, slice(0, 15))
        path = tmp_path/type(opt).__name__
        weights,state = get_state_dict(model, opt)
        dcp.save(dict(model=weights, opt=state), checkpoint_id=path)
        weights,state = get_state_dict(again, other)
        saved = dict(model=weights, opt=state)
        dcp.load(saved, checkpoint_id=path)
        set_state_dict(again, other, model_state_dict=saved['model'], optim_state_dict=saved['opt'])
        assert a.step==b.step==15
        for net,o in ((model, opt), (again, other)): steps(net, o, slice(15, TOTAL))
        assert not changed(snapshot(model, opt), snapshot(again, other))

# ------------------------------------------------------------ compact files
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('name', REMEMBER)
def test_compact_files_have_it(name, opt, tmp_path):
    model,method = made(name)
    o = OPTS[opt](model.parameters())
    run(model, o, method, range(1, 16))
    save_sparse(model, tmp_path/'m', o)
    again,_ = made(name, seed=1)
    other = OPTS[opt](again.parameters())
    load_sparse(tmp_path/'m', again, other)
    for net,x in ((model, o), (again, other)): run(net, x, method, range(16, TOTAL+1))
    assert not changed(snapshot(model, o), snapshot(again, other))

# ------------------------------------------------------------ earlier versions kept it in buffers of the model
@pytest.mark.parametrize('way', ['load_state_dict', 'load_sparse_state', 'compressed', 'file'])
@pytest.mark.parametrize('name', ['RigL_avg', 'DSR', 'TopKAST'])
def test_states_of_earlier_versions(name, way, tmp_path):
    if name=='TopKAST' and way=='compressed': pytest.skip('needs values outside the masks')
    def new(seed):
        model,method = made(name, seed)
        opt = OPTS['momentum'](model.parameters())
        if way=='compressed': compressed(method, model, opt)
        return model,opt,method
    model,opt,method = new(0)
    run(model, opt, method, range(1, 16))
    before = copy.deepcopy(model)
    for a,b in zip(before.modules(), model.modules()):
        for p in b._parameters.values():
            for what,t in (remembered(p) if p is not None else {}).items(): a.register_buffer(memory_name('weight', what), t.clone())
    old = before.state_dict()
    old_opt = copy.deepcopy(opt.state_dict())
    del old_opt['param_groups'][0]['sparsefast_memory']
    again,other,_ = new(1)
    if way=='load_sparse_state': load_sparse_state(again, old)
    elif way=='file':
        save_sparse(before, tmp_path/'m')
        load_sparse(tmp_path/'m', again)
    else: again.load_state_dict(old)
    other.load_state_dict(old_opt)
    assert all_remembered(again).keys()==all_remembered(model).keys() and list(again.state_dict())==list(model.state_dict())
    for net,o in ((model, opt), (again, other)): run(net, o, method, range(16, TOTAL+1))
    assert not changed(snapshot(model, opt), snapshot(again, other))

# ------------------------------------------------------------ where it goes
def test_converted_layers_remember_and_copies_do_not():
    model,method = made('RigL_avg')
    opt = OPTS['momentum'](model.parameters())
    run(model, opt, method, range(1, 5))
    known = {n: t.clone() for (n,_),t in all_remembered(model).items()}
    assert not all_remembered(copy.deepcopy(model)) and len(known)==3
    to_sparse_layers(model, opt, least=0.)
    assert all(torch.equal(memory(m.values)['grad'], known[f'{n}.weight']) for n,m in model.named_modules() if hasattr(m, 'values'))
    to_masked_layers(model, opt)
    assert all(torch.equal(memory(model.get_submodule(n.rpartition('.')[0]).weight)['grad'], t) for n,t in known.items())
    unsparsify_model(model)
    assert not all_remembered(model)

def test_what_is_remembered_moves_with_the_parameter():
    "A device of its own stands for a GPU; a parameter that is offloaded takes nothing with it"
    one = Remembers()
    one.p = SimpleNamespace(device=torch.device('meta'), is_meta=True)
    one.remember('grad', torch.ones(2))
    one.remember('dense', torch.ones(2), saved=False)
    assert one.recall('grad').device.type=='cpu'
    one.p.is_meta = False
    assert one.recall('grad').is_meta and one.recall('dense').is_meta and one.recall('grad') is one.recall('grad') and one.recall('nothing') is None
