"Compact checkpoints: what comes back is what was saved, and what is wrong is refused before anything changes"
import json, math, os, platform, random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from fastai.optimizer import Adam as FastaiAdam, Lookahead, OptimWrapper, SGD as FastaiSGD
from helpers import TORCH_OPTS, backward, batches, changed, masked_are_zero, mlp, snapshot, sparse_mlp
from sparsefast.checkpoint import atomic_save
from sparsefast.ship import codes, files
from sparsefast.ship.files import check_code, decode, encode, load_sparse, pack_mask, save_sparse, to_gaps, unpack_mask
from sparsefast.storage import SparseConv2d, SparseLinear
from sparsefast.masks import masked_params, sparse_mask
from sparsefast.methods import DSTMethod
from sparsefast.presets import RigL_presets, SR_STE_presets, Static_presets, TopKAST_presets
from sparsefast.sparsify import add_mask, load_sparse_state, sparsify_model, unsparsify_model
from sparsefast.utils import atomic_write

def same_state(a, b): return a.keys()==b.keys() and all(a[k].dtype==b[k].dtype and a[k].shape==b[k].shape and torch.equal(a[k], b[k]) for k in a)

# ------------------------------------------------------------ codes of masks
def gaps_by_hand(bits):
    "The format, in a loop"
    code,run = [], 0
    for b in [*bits, 1]:
        if not b: run += 1; continue
        code += [255]*(run//255) + [run%255]
        run = 0
    return code

@given(st.integers(0, 1200), st.floats(0, 1), st.integers(0, 9))
def test_codes(n, sparsity, seed):
    mask = sparse_mask((n,), sparsity, torch.Generator().manual_seed(seed))
    assert to_gaps(mask).tolist()==gaps_by_hand(mask.tolist())
    how,code = pack_mask(mask)
    assert len(code)<=-(-n//8) and check_code(how, code, n)==int(mask.sum()) and torch.equal(unpack_mask(how, code, (n,)), mask)
    gaps = to_gaps(mask)
    assert check_code('gaps', gaps, n)==int(mask.sum()) and torch.equal(unpack_mask('gaps', gaps, (n,)), mask)
    for wrong in (n+8, n-8, 8*n+8):
        if wrong<0: continue
        for h,c in ((how, code), ('gaps', gaps)):
            with pytest.raises(ValueError, match='are not a mask of'): check_code(h, c, wrong)

@pytest.mark.parametrize('how, code, numel', [('bits', [255], 7), ('bits', [], 1), ('gaps', [], 0), ('gaps', [255], 255), ('gaps', [0, 255], 256), ('gaps', [3, 0], 3)])
def test_codes_that_are_none(how, code, numel):
    with pytest.raises(ValueError, match='are not a mask of'): check_code(how, torch.tensor(code, dtype=torch.uint8), numel)

# ------------------------------------------------------------ round trips
def nets():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    tied[2].weight = tied[0].weight
    return dict(mlp=mlp(20, 30, 5), double=mlp(20, 30, 5, dtype=torch.float64), half=mlp(20, 30, 5, dtype=torch.bfloat16), tied=tied, lstm=nn.LSTM(10, 12, 2),
                conv=nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten()).to(memory_format=torch.channels_last),
                transformer=nn.TransformerEncoderLayer(16, 2, 32), transposed=nn.ConvTranspose2d(4, 6, 3), scalar=nn.Sequential(nn.PReLU(), nn.Linear(4, 1)))

@pytest.mark.parametrize('name', nets())
@pytest.mark.parametrize('sparsity', [0.3, 0.9, 1.])
@pytest.mark.filterwarnings('ignore:a layer of')
def test_round_trip(name, sparsity, tmp_path):
    model = nets()[name]
    sparsify_model(model, sparsity)
    state = {k: v.clone() for k,v in model.state_dict().items()}
    save_sparse(model, tmp_path/'m')
    assert same_state(load_sparse(tmp_path/'m'), state) and not changed(state, model.state_dict())
    for other in (nets()[name], model, nets()[name]):
        if other is not model and sparsity<0.5: sparsify_model(other, 0.6)               # masks of its own, which go
        with torch.no_grad():
            for p in other.parameters(): p.add_(1)
        assert load_sparse(tmp_path/'m', other) is other and same_state(other.state_dict(), state)
    assert sum(len(m._forward_pre_hooks) for m in other.modules())==sum(len(m._forward_pre_hooks) for m in model.modules())

def test_dense_models_and_learners(tmp_path):
    from helpers import learner
    model = mlp(8, 5, 3)
    save_sparse(model, tmp_path/'dense')
    assert same_state(load_sparse(tmp_path/'dense'), model.state_dict())
    learn,other = learner(tmp=tmp_path), sparse_mlp(seed=1)
    save_sparse(learn, tmp_path/'learn')
    load_sparse(tmp_path/'learn', other)
    assert same_state(other.state_dict(), learn.model.state_dict())
    save_sparse(other, tmp_path/'learn')
    load_sparse(tmp_path/'learn', learn)
    unsparsify_model(other)
    load_sparse(tmp_path/'dense', unsparsify_model(mlp(8, 5, 3)))

def test_what_is_masked_is_not_written(tmp_path):
    model = sparse_mlp(0.9)
    with torch.no_grad():
        for p in model.parameters(): p.fill_(7.)
    save_sparse(model, tmp_path/'m')
    assert all((p==7).all() for p in model.parameters())                                  # the model itself is left alone
    state = load_sparse(tmp_path/'m')
    assert all((state[f'{i}.weight'][~state[f'{i}.weight_mask']]==0).all() for i in (0, 2, 4))

@pytest.mark.parametrize('preset', [SR_STE_presets, TopKAST_presets], ids=['SR-STE','Top-KAST'])
def test_memory_of_methods(preset, tmp_path):
    torch.manual_seed(0)
    model,twin = mlp(8, 24, 20, 4), mlp(8, 24, 20, 4)
    method = DSTMethod(**{**preset, 'batches_per_update': 3})
    sparsify_model(model, 0.5, **method.start(0.5))
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step,(x,y) in enumerate(batches(12, n_out=4), 1):
        backward(model, x, y)
        method.step(model, opt, step, (step-1)/40)
    assert any('_dst_' in k for k in model.state_dict())
    save_sparse(model, tmp_path/'m', opt)
    twin_opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    load_sparse(tmp_path/'m', twin, twin_opt)
    assert not changed(snapshot(model, opt), snapshot(twin, twin_opt)) and same_state(model.state_dict(), twin.state_dict())

def by_fastai(f, **kw): return lambda ps: f([list(ps)], **kw)
OPTS = {**TORCH_OPTS, 'fastai sgd': by_fastai(FastaiSGD, lr=0.05, mom=0.9), 'fastai adam': by_fastai(FastaiAdam, lr=1e-2),
        'lookahead': lambda ps: Lookahead(FastaiAdam([list(ps)], lr=1e-2), k=3), 'wrapped': lambda ps: OptimWrapper(list(ps), torch.optim.AdamW, lr=1e-2)}

@pytest.mark.parametrize('name', OPTS)
def test_training_goes_on_as_if_nothing_had_been(name, tmp_path):
    "The same weights, bit for bit, as a run that was not interrupted"
    def run(model, opt, a, b):
        method = DSTMethod(**{**RigL_presets, 'batches_per_update': 8})
        for step,(x,y) in list(enumerate(batches(40), 1))[a:b]:
            backward(model, x, y)
            method.step(model, opt, step, (step-1)/40)
    model,fresh = sparse_mlp(), sparse_mlp(seed=3)
    opt = OPTS[name](model.parameters())
    run(model, opt, 0, 20)
    save_sparse(model, tmp_path/'m', opt)
    fresh_opt = OPTS[name](fresh.parameters())
    load_sparse(tmp_path/'m', fresh, fresh_opt)
    assert not changed(snapshot(model, opt), snapshot(fresh, fresh_opt))
    for m,o in ((model, opt), (fresh, fresh_opt)): run(m, o, 20, 40)
    assert not changed(snapshot(model, opt), snapshot(fresh, fresh_opt))

def test_group_settings_come_back(tmp_path):
    model = sparse_mlp()
    groups = lambda m: [dict(params=m[0].parameters(), lr=0.3), dict(params=[*m[2].parameters(), *m[4].parameters()], betas=(0.5, 0.6))]
    opt,other = torch.optim.Adam(groups(model), lr=0.1), torch.optim.Adam(groups(model), lr=0.2)
    save_sparse(model, tmp_path/'m', opt)
    load_sparse(tmp_path/'m', model, other)
    assert other.state_dict()==opt.state_dict()

# ------------------------------------------------------------ sizes
@pytest.mark.parametrize('sparsity, most', [(0.8, 0.235), (0.9, 0.135), (0.95, 0.075), (0.98, 0.04), (0.99, 0.025)])
def test_size(sparsity, most, tmp_path):
    model = mlp(784, 300, 100, 10)
    save_file(model.state_dict(), tmp_path/'dense')
    opt = torch.optim.Adam(model.parameters())
    sparsify_model(model, sparsity)
    for p in model.parameters(): p.grad = p.detach().clone()                             # zero where the weights are
    opt.step()
    save_sparse(model, tmp_path/'m')
    save_sparse(model, tmp_path/'with', opt)
    dense = (tmp_path/'dense').stat().st_size
    assert (tmp_path/'m').stat().st_size<=most*dense and (tmp_path/'with').stat().st_size<=3*most*dense

# ------------------------------------------------------------ damage
@pytest.fixture
def saved(tmp_path):
    model = sparse_mlp(0.8, sizes=(8, 12, 3))
    opt = torch.optim.Adam(model.parameters())
    backward(model, *batches(1)[0])
    DSTMethod(**Static_presets).step(model, opt, 1, 0.)
    save_sparse(model, tmp_path/'m', opt)
    return model,opt,tmp_path/'m'

def refuses(path, match=None, opt=True):
    "Without a model, and with one that stays as it is, bit for bit"
    model = sparse_mlp(0.5, sizes=(8, 12, 3), seed=5)
    o = torch.optim.Adam(model.parameters())
    backward(model, *batches(1)[0])
    o.step()
    before = snapshot(model, o)
    with pytest.raises(ValueError, match=match or 'cannot be loaded'): load_sparse(path, model, o if opt else None)
    assert not changed(before, snapshot(model, o))

def test_cut_off_anywhere(saved, tmp_path):
    whole = saved[2].read_bytes()
    for n in [*range(0, len(whole), 97), len(whole)-1]:
        (tmp_path/'cut').write_bytes(whole[:n])
        refuses(tmp_path/'cut')
        with pytest.raises(ValueError, match='cannot be loaded'): load_sparse(tmp_path/'cut')

def test_one_bit_changed_anywhere(saved, tmp_path):
    whole,state = saved[2].read_bytes(), load_sparse(saved[2])
    rng = random.Random(0)
    for i in rng.sample(range(len(whole)), 600):
        (tmp_path/'bit').write_bytes(whole[:i] + bytes([whole[i]^(1<<rng.randrange(8))]) + whole[i+1:])
        with pytest.raises(ValueError, match='cannot be loaded'): load_sparse(tmp_path/'bit')

def forge(path, change, to):
    "A file with a right checksum, whose content `change(data, description)` has altered"
    with safe_open(path, 'pt') as f: desc = json.loads(f.metadata()['sparsefast'].partition(' ')[2])
    data = load_file(path)
    change(data, desc)
    desc = json.dumps(desc)
    save_file(data, to, {'sparsefast': f'{files._digest(desc, data)} {desc}'})
    return to

def _set(**kw):
    def f(data, desc): data.update({k.replace('__', '.'): v for k,v in kw.items()})
    return f
def _how(name, **kw): return lambda data, desc: desc['how'].__setitem__(name, kw)
def _tree(old, new):
    def f(data, desc): desc['opt'] = json.loads(json.dumps(desc['opt']).replace(old, new))
    return f
W,M = '0.weight','0.weight_mask'
def _moment(shape):
    def f(data, desc): n = 'optimizer/state/0/exp_avg'; desc['how'][n] = {}; data[n] = torch.zeros(shape)
    return f
def _huge(data, desc):
    data[M] = torch.tensor([255]*10_000+[0], dtype=torch.uint8)
    data[W] = torch.zeros(0)
    desc['how'][M] = {'as': 'gaps', 'shape': [2_550_000]}
    for n in list(desc['how']):
        if n.startswith('optimizer/state/0'): desc['how'][n],data[n] = {}, torch.zeros(1)
    for i in range(10_000): desc['how'][f'x{i}'],data[f'x{i}'] = {'on': M}, torch.zeros(0)
def _orphan(data, desc): data['x_mask'],desc['how']['x_mask'] = torch.tensor([255]*2000+[0], dtype=torch.uint8),{'as': 'gaps', 'shape': [510_000]}
def _orphan_bias(data, desc): data['0.bias_mask'],desc['how']['0.bias_mask'] = u8([255, 240]),{'as': 'bits', 'shape': [12]}; desc['model'].append('0.bias_mask')
def _memory(name, t):
    def f(data, desc): data[name],desc['how'][name] = t,{}; desc['model'].append(name)
    return f
u8 = partial(torch.tensor, dtype=torch.uint8)
FORGED = dict(
    values_too_few      = (_set(**{'0__weight': torch.ones(3)}), 'to go with its mask'),
    values_too_many     = (_set(**{'0__weight': torch.ones(96)}), 'to go with its mask'),
    values_of_two_dims  = (_set(**{'0__weight': torch.ones(12, 8)}), 'to go with its mask'),
    code_too_short      = (_set(**{'0__weight_mask': u8([1, 2])}), 'are not a mask of'),
    code_too_long       = (_set(**{'0__weight_mask': u8([0]*500)}), 'are not a mask of'),
    code_of_floats      = (_set(**{'0__weight_mask': torch.ones(12)}), 'is not a packed mask'),
    unknown_code        = (_how(M, **{'as': 'zip', 'shape': [12, 8]}), 'is not a packed mask'),
    huge_shape          = (_how(M, **{'as': 'gaps', 'shape': [10**6, 10**6]}), 'are not a mask of'),
    shape_overflows     = (_how(M, **{'as': 'gaps', 'shape': [2**40, 2**40]}), 'shape must be a list'),
    shape_of_nothing    = (_how(M, **{'as': 'gaps', 'shape': [0, 2**63]}), 'shape must be a list'),
    negative_shape      = (_how(M, **{'as': 'gaps', 'shape': [-12, -8]}), 'shape must be a list'),
    shape_of_floats     = (_how(M, **{'as': 'gaps', 'shape': [12., 8.]}), 'shape must be a list'),
    shape_of_booleans   = (_how(M, **{'as': 'gaps', 'shape': [True, 96]}), 'shape must be a list'),
    shape_is_a_word     = (_how(M, **{'as': 'gaps', 'shape': '96'}), 'shape must be a list'),
    other_shape         = (_how(M, **{'as': 'bits', 'shape': [8, 12]}), 'has shape|does not fit'),
    many_huge           = (_huge, 'claims to hold'),
    no_such_mask        = (_how(W, on='0.nothing'), 'not a mask of this file'),
    its_own_mask        = (_how(W, on=W), 'not a mask of this file'),
    both_sides          = (_how(W, on=M, off=M), 'description'),
    mask_is_no_word     = (_how(W, on=[M]), 'invalid description'),
    same_as_itself      = (_how('0.bias', same='0.bias'), 'both stored and described'),
    nothing_described   = (lambda data, desc: desc['how'].pop(W), 'both stored and described'),
    more_described      = (_how('3.weight'), 'both stored and described'),
    more_stored         = (_set(**{'3__weight': torch.ones(1)}), 'both stored and described'),
    nan_target          = (_set(**{'0__weight_sparsity': torch.tensor(math.nan)}), 'must be a number from 0 to 1'),
    target_of_2         = (_set(**{'0__weight_sparsity': torch.tensor(2.)}), 'must be a number from 0 to 1'),
    target_of_dims      = (_set(**{'0__weight_sparsity': torch.tensor([0.5])}), 'must be a number from 0 to 1'),
    whole_numbers       = (_set(**{'0__bias': torch.ones(12, dtype=torch.int64)}), 'torch.int64'),
    wrong_bias          = (_set(**{'0__bias': torch.ones(13)}), 'has shape'),
    not_a_list          = (lambda data, desc: desc.update(how=[1]), 'description'),
    not_in_model        = (lambda data, desc: desc.update(model=desc['model']+['9.weight']), 'not all tensors'),
    model_lacks_one     = (lambda data, desc: desc['model'].remove('0.bias'), 'missing in the state'),
    later_version       = (lambda data, desc: desc.update(version=2), 'version'),
    no_optimizer        = (lambda data, desc: desc.pop('opt'), 'no optimizer state'),
    moment_of_4_dims    = (_moment((8, 12)), "'exp_avg' in the optimizer state has shape"),
    moment_of_one       = (_moment((1,)), "'exp_avg' in the optimizer state has shape"),
    state_of_nobody     = (_tree('[[0, {"dict": [["step"', '[[99, {"dict": [["step"'), "entry '99'"),
    other_optimizer     = (_tree('amsgrad', 'nesterov'), 'another kind'),
    other_numbering     = (_tree('["params", {"list": [0, 1', '["params", {"list": [1, 0'), 'numbers its parameters'),
    no_such_tensor      = (_tree('optimizer/state/0/exp_avg"', 'optimizer/state/7"'), 'cannot be loaded'),
    other_groups        = (lambda data, desc: desc['opt'].update(shapes=[[[12, 8], [12], [3, 12]], [[3]]]), 'other shapes, order or groups'),
    mask_of_nobody      = (_orphan, 'belong to nothing'),
    listed_twice        = (lambda data, desc: desc['model'].append(W), 'belong to nothing, or to two things'),
    moment_is_a_weight  = (_tree('optimizer/state/0/exp_avg"', '0.weight"'), 'belong to nothing, or to two things'),
    target_is_a_bias    = (lambda data, desc: (data.pop('0.weight_sparsity'), desc['how'].update({'0.weight_sparsity': dict(same='0.bias')})), 'must be a number from 0 to 1'),
    memory_of_3         = (_memory('0.weight_dst_store', torch.ones(3)), 'nothing that a method remembers'),
    memory_of_no_name   = (_memory('0.weight_dst_a.b', torch.ones(12, 8)), 'nothing that a method remembers'),
    weight_of_8_bits    = (lambda data, desc: data.update({W: data[W].to(torch.float8_e4m3fn)}), 'cannot be loaded'),
    no_groups           = (_tree(json.dumps('param_groups')+', {"list": [', json.dumps('param_groups')+', {"list": [], "x": ['), 'cannot be loaded'),
    moment_missing      = (_tree('["exp_avg_sq"', '["other"'), 'none to go on with: .*exp_avg_sq'),
    steps_missing       = (_tree('["step"', '["other"'), 'none to go on with: .*step'),
    negative_variance   = (lambda data, desc: data['optimizer/state/0/exp_avg_sq'].neg_(), 'none to go on with: its numbers are not finite'),
    infinite_moment     = (lambda data, desc: data['optimizer/state/1/exp_avg'].fill_(math.inf), 'none to go on with: its numbers are not finite'),
    lr_is_a_word        = (_tree('["lr", 0.001]', '["lr", "fast"]'), 'none to go on with'),
    lr_is_no_number     = (_tree('["lr", 0.001]', '["lr", NaN]'), 'none to go on with'),
    betas_of_one        = (_tree('[0.9, 0.999]', '[0.9]'), 'none to go on with'),
    beta_of_one         = (_tree('[0.9, 0.999]', '[0.9, 1.0]'), 'none to go on with'),
    deep                = (lambda data, desc: desc['opt'].update(tree=json.loads('{"list":['*300+'1'+']}'*300)), 'cannot be loaded'))

@pytest.mark.parametrize('change, says', FORGED.values(), ids=list(FORGED))
def test_forged_with_the_right_checksum(saved, tmp_path, change, says):
    path = forge(saved[2], change, tmp_path/'forged')
    assert path.read_bytes()!=saved[2].read_bytes()
    refuses(path, says)

def test_forging_itself_is_no_reason(saved, tmp_path):
    path = forge(saved[2], lambda data, desc: None, tmp_path/'forged')
    model = sparse_mlp(0.5, sizes=(8, 12, 3), seed=5)
    load_sparse(path, model, opt := torch.optim.Adam(model.parameters()))
    assert not changed(snapshot(saved[0], saved[1]), snapshot(model, opt))

def test_a_huge_claim_costs_nothing(saved, tmp_path):
    "Refused by arithmetic: nothing the size of the claim is allocated"
    path = forge(saved[2], _huge, tmp_path/'forged')
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(files, 'decode', lambda *args: pytest.fail('decoded'))
        for room in (codes, files): mp.setattr(room, 'unpack_mask', lambda *args: pytest.fail('unpacked'))
        with pytest.raises(ValueError, match='claims to hold'): load_sparse(path)

def test_what_no_layer_has_is_not_decoded(saved, tmp_path, monkeypatch):
    "Nor is the optimizer's state where nobody asks for it"
    unpacked,unpack = [], unpack_mask
    monkeypatch.setattr(codes, 'unpack_mask', lambda how, code, shape: unpacked.append(shape) or unpack(how, code, shape))
    for change in (_orphan, _how(M, **{'as': 'bits', 'shape': [8, 12]}), _tree('amsgrad', 'nesterov')): refuses(forge(saved[2], change, tmp_path/'forged'))
    assert not unpacked
    made = []
    monkeypatch.setattr(files, 'decode', lambda *args: made.append(decode(*args)) or made[-1])
    load_sparse(saved[2], sparse_mlp(0.5, sizes=(8, 12, 3)))
    assert len(unpacked)==2 and not any(n.startswith('optimizer') for n in made[0])

@pytest.mark.parametrize('enforce', [True, False])
def test_numbers_outside_a_mask_are_not_loaded(saved, tmp_path, enforce):
    path = forge(saved[2], lambda data, desc: (data.update({W: torch.ones(12, 8)}), desc['how'].update({W: {}})), tmp_path/'forged')
    model = load_sparse(path, mlp(8, 12, 3), enforce_mask=enforce)
    assert torch.equal(model[0].weight, model[0].weight_mask.float()) and torch.equal(model[0].weight_mask, saved[0][0].weight_mask)
    load_sparse_state(model, {**model.state_dict(), W: torch.full((12, 8), 2.)}, enforce)
    assert torch.equal(model[0].weight, 2*model[0].weight_mask)

def test_an_optimizer_that_cannot_be_tried_is_served(tmp_path):
    "LBFGS wants a closure, and its state is of no parameter's shape"
    def trained(seed, steps):
        model = sparse_mlp(0.5, sizes=(8, 6, 3), seed=seed)
        opt = torch.optim.LBFGS(model.parameters(), max_iter=2)
        for x,y in batches(steps): opt.step(lambda: backward(model, x, y) or F.cross_entropy(model(x), y))
        return model,opt
    (model,opt),(twin,twin_opt) = trained(0, 3),trained(1, 0)
    load_sparse(save_sparse(model, tmp_path/'m', opt), twin, twin_opt)
    (a,),(b,) = opt.state.values(),twin_opt.state.values()
    assert a.keys()==b.keys() and torch.equal(a['d'], b['d']) and all(map(torch.equal, a['old_dirs'], b['old_dirs']))

# ------------------------------------------------------------ hundreds of forged files
def _junk(rng): return rng.choice([None, True, -1, 3, 1e300, math.nan, '', 'x', W, [], {}, [1], {'tensor': W}, {'tensor': 'x'}, {'dict': []}, {'tuple': [12, 8]}, {'L': [1]}, 10**30])
def _tensor(rng, t):
    shape = rng.choice([(), (0,), (1,), (12,), (12,8), (8,12), (2,12,8), (*t.shape, 1), t.shape[:-1], t.shape, t.shape])
    value,dtype = rng.choice([0, 1, -1, math.nan, 1e30, -1e-9]),rng.choice([torch.float32, t.dtype, t.dtype, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
    return torch.full(shape, float(value)).to(dtype)
def _places(o, path=()):
    for k in o if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
        yield o,k
        yield from _places(o[k])
def forgery(rng):
    "A random change of stored tensors, their names and descriptions, the list of names, or the optimizer's tree"
    def change(data, desc):
        (n,m),how,kind = rng.sample(sorted(data), 2),desc['how'],rng.randrange(8)
        if kind==0: data[n] = _tensor(rng, data[n])
        if kind==1: data[n],data[m] = data[m],data[n]
        if kind==2: how[n],how[m] = how[m],how[n]
        if kind==3: how[n] = rng.choice([{}, dict(on=m), dict(off=m), dict(same=m), {'as': 'bits', 'shape': [12, 8]}, _junk(rng)])
        if kind==4: data.pop(n); how[n] = dict(same=m)
        if kind==5: new = rng.choice([n+'_mask', n+'_dst_x', n+'_dst_a.b', '9.weight', '']); data[new],how[new] = _tensor(rng, data[n]),{}; desc['model'].append(new)
        if kind>=6:
            o,k = rng.choice([*_places(desc['opt' if rng.random()<.8 else 'model'])])
            if rng.random()<.2: del o[k]
            else: o[k] = _junk(rng)
    return change

@pytest.mark.parametrize('form', ['masked', 'compressed'])
@pytest.mark.parametrize('name', ['momentum', 'adam', 'lookahead'])
def test_forged_files(form, name, tmp_path):
    "Each is refused by a ValueError, and nothing has changed, or is loaded into a model that trains: masked weights zero, all numbers finite"
    def trained(seed):
        model = sparse_mlp(0.6, sizes=(8, 12, 3), seed=seed)
        model = in_layers(model) if form=='compressed' else model
        opt = OPTS[name](list(model.parameters()))
        return model,opt,lambda: (backward(model, *batches(1)[0]), opt.step())
    model,opt,step = trained(0)
    step()
    save_sparse(model, tmp_path/'m', opt)
    rng,refused,fresh = random.Random(name+form), 0, lambda: trained(1)
    model,opt,step = fresh()
    before,settings = snapshot(model, opt),str(opt.state_dict())
    for i in range(50):
        try: load_sparse(forge(tmp_path/'m', forgery(rng), tmp_path/'forged'), model, opt)
        except ValueError as e:
            assert 'cannot be loaded' in str(e) and not changed(before, snapshot(model, opt)) and str(opt.state_dict())==settings, (i, e)
            refused += 1
            continue
        assert masked_are_zero(model), i
        if all(t.isfinite().all() for t in model.state_dict().values()):
            step()
            assert all(p.isfinite().all() for p in model.parameters()), i
        model,opt,step = fresh()
    assert 25<refused<50

def test_the_code_runs_too_deep(tmp_path):
    desc = '{"version":1,"how":' + '['*100_000 + ']'*100_000 + '}'
    save_file(dict(a=torch.ones(1)), tmp_path/'deep', {'sparsefast': f"{files._digest(desc, dict(a=torch.ones(1)))} {desc}"})
    with pytest.raises(ValueError, match='cannot be loaded'): load_sparse(tmp_path/'deep')

@pytest.mark.parametrize('other, says', [(lambda: mlp(8, 12, 4), 'has shape'), (lambda: mlp(8, 12, 3, 3), 'missing in the state'), (lambda: mlp(8, 3), 'not in the model'),
                                         (lambda: mlp(8, 12, 3, bias=False), 'not in the model')])
def test_another_model(saved, other, says):
    model = other()
    sparsify_model(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=says): load_sparse(saved[2], model)
    assert not changed(before, snapshot(model)) and all(m._forward_pre_hooks for m in model if isinstance(m, nn.Linear))

@pytest.mark.parametrize('other', ['SGD', 'fastai adam', 'groups'])
def test_another_optimizer(saved, other):
    model = sparse_mlp(0.5, sizes=(8, 12, 3), seed=5)
    opt = dict(SGD=lambda ps: torch.optim.SGD(ps, lr=0.1), groups=lambda ps: torch.optim.Adam([dict(params=[p]) for p in ps]), **{'fastai adam': OPTS['fastai adam']})[other](list(model.parameters()))
    before = snapshot(model, opt)
    with pytest.raises(ValueError, match='optimizer state'): load_sparse(saved[2], model, opt)
    assert not changed(before, snapshot(model, opt))

def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'nothing')
    torch.save(dict(a=torch.ones(1)), tmp_path/'pickle')
    save_file(dict(a=torch.ones(1)), tmp_path/'plain')
    (tmp_path/'empty').write_bytes(b'')
    for f in ('pickle', 'plain'):
        with pytest.raises(ValueError, match='`save_sparse` did not write it.*`load_sparse_state'): load_sparse(tmp_path/f)
    for f in ('pickle', 'plain', 'empty'):
        with pytest.raises(ValueError, match=f"{f}' cannot be loaded"): load_sparse(tmp_path/f)
    with pytest.raises(ValueError, match='did not write it'): load_sparse(tmp_path/'plain')

def test_what_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self): return dict(a=1)
    with pytest.raises(ValueError, match='_extra_state'): save_sparse(Extra(2, 2), tmp_path/'m')
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]['f'] = print
    with pytest.raises(ValueError, match='optimizer/param_groups/0/f is builtin'): save_sparse(model, tmp_path/'m', opt)
    assert not list(tmp_path.iterdir())

def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    before = saved[2].read_bytes()
    def half(data, path, *args): path.write_bytes(b'half'); raise KeyboardInterrupt
    monkeypatch.setattr(files, 'save_file', half)
    with pytest.raises(KeyboardInterrupt): save_sparse(sparse_mlp(seed=9), saved[2])
    assert saved[2].read_bytes()==before

def test_files_hold_no_pickle(saved):
    whole = saved[2].read_bytes()
    assert b'\x80\x04' != whole[:2] and b'torch._utils' not in whole and not whole.startswith(b'PK')

# ------------------------------------------------------------ sparse layers
def in_layers(model):
    "Sparse layers in place of masked ones"
    for n,m in list(model.named_modules()):
        if 'weight_mask' in m._buffers: model.set_submodule(n, (SparseLinear if isinstance(m, nn.Linear) else SparseConv2d).from_masked(m))
    return model

def convs(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8*16, 3))
def sparse_convs(seed=0, sparsity=0.7):
    torch.manual_seed(seed)
    sparsify_model(model := convs(), sparsity, exclude=[0])
    return model

def test_sparse_layers_are_written_as_masked_ones(tmp_path):
    model = sparse_convs()
    a = save_sparse(model, tmp_path/'a').read_bytes()
    b = save_sparse(in_layers(deepcopy(model)), tmp_path/'b')
    assert same_state(load_sparse(b), model.state_dict()) and abs(len(a)-b.stat().st_size)<100

@pytest.mark.parametrize('source', ['masked', 'layers'])
@pytest.mark.parametrize('target', ['masked', 'layers', 'dense', 'other layers'])
def test_files_go_between_forms(source, target, tmp_path):
    make = dict(masked=sparse_convs, layers=lambda *a: in_layers(sparse_convs(*a)), dense=lambda *a: convs())
    make['other layers'] = lambda *a: in_layers(sparse_convs(5, 0.4))
    x = torch.randn(4, 3, 6, 6)
    def trained(kind, seed, steps=4):
        model = make[kind](seed)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method = DSTMethod(**Static_presets)
        for step in range(1, steps+1):
            opt.zero_grad()
            model(x).square().mean().backward()
            if list(masked_params(model)): method.step(model, opt, step, 0.)
            else: opt.step()
        return model,opt
    model,opt = trained(source, 0)
    other,other_opt = trained(target, 3, 2)
    values = [id(p) for p in other.parameters()]
    save_sparse(model, tmp_path/'m', opt)
    load_sparse(tmp_path/'m', other, other_opt)
    assert [id(p) for p in other.parameters()]==values                                    # the optimizer still has them
    assert same_state(files.masked_state(model), files.masked_state(other))
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    save_sparse(other, tmp_path/'n', other_opt)
    a,b = ({k: v for k,v in load_file(tmp_path/f).items() if k.startswith('optimizer/state')} for f in 'mn')
    assert same_state(a, b)

def test_a_file_without_masks_is_not_for_sparse_layers(tmp_path):
    save_sparse(convs(), tmp_path/'dense')
    model = in_layers(sparse_convs())
    before = snapshot(model)
    with pytest.raises(ValueError, match="no mask for the compressed layer '3'"): load_sparse(tmp_path/'dense', model)
    assert not changed(before, snapshot(model))

@pytest.mark.parametrize('target', ['masked', 'layers'])
def test_slow_weights_of_lookahead(target, tmp_path):
    def trained(seed, steps, form='masked'):
        model = sparse_mlp(0.6, sizes=(8, 12, 3), seed=seed)
        model = in_layers(model) if form=='layers' else model
        opt = OPTS['lookahead'](list(model.parameters()))
        return model,opt,go_on(model, opt, steps)
    def go_on(model, opt, steps):
        for x,y in batches(steps): backward(model, x, y); opt.step()
    (model,opt,_),(twin,twin_opt,_) = trained(0, 2),trained(1, 1, target)
    path = save_sparse(model, tmp_path/'m', opt)
    load_sparse(path, twin, twin_opt)
    assert [w.shape for w in twin_opt.slow_weights[0]]==[p.shape for p in twin.parameters()] and twin_opt.count==2
    go_on(twin, twin_opt, 2)
    assert all(p.isfinite().all() for p in twin.parameters())
    for count in (-1, 'two', 1.5, None):
        def change(data, desc): dict(map(lambda kv: (kv[0], kv), desc['opt']['tree']['dict']))['count'][1] = count
        with pytest.raises(ValueError, match='counts steps by'): load_sparse(forge(path, change, tmp_path/'forged'), twin, twin_opt)

@pytest.mark.parametrize('state, model, says', [('dense', 'layers', "'0' is compressed in the model only: call `to_masked_layers"), ('masked', 'layers', "'0' is compressed in the model only"),
                                                ('layers', 'dense', "'0' is compressed in the state only"), ('layers', 'masked', "'0' is compressed in the state only.*save_sparse")])
def test_states_of_other_forms(state, model, says):
    masked = partial(sparse_mlp, sizes=(8, 12, 3))
    make = dict(dense=lambda: mlp(8, 12, 3), masked=masked, layers=lambda: in_layers(masked()))
    state,model = make[state]().state_dict(),make[model]()
    before = snapshot(model)
    with pytest.raises(ValueError, match=says): load_sparse_state(model, state)
    assert not changed(before, snapshot(model))

def test_a_weight_of_another_size():
    "A head that was replaced by hand: the layer and the way out"
    model = sparse_mlp(sizes=(8, 12, 3))
    model[2].weight,model[2].bias = nn.Parameter(torch.randn(5, 12)),nn.Parameter(torch.zeros(5))
    for f in (lambda: model(torch.randn(2, 8)), lambda: list(masked_params(model))):
        with pytest.raises(ValueError, match=r'`weight_mask` of .2. must be .*\(5, 12\).*add_mask\(module'): f()
    add_mask(model[2], 'weight', torch.ones(5, 12, dtype=torch.bool))
    assert model(torch.randn(2, 8)).shape==(2, 5)

# ------------------------------------------------------------ masks without a target, tied weights, wrapped models
def test_masks_without_a_target(tmp_path):
    def without(model):
        for m in model.modules(): m._buffers.pop('weight_sparsity', None)
        return model
    model = without(sparse_mlp(0.7))
    path = save_sparse(model, tmp_path/'m')
    assert same_state(load_sparse(path), model.state_dict())
    for other in (mlp(8,24,20,3), sparse_mlp(0.3, seed=1), in_layers(sparse_mlp(0.3, seed=1)), in_layers(without(sparse_mlp(0.3, seed=1)))):
        load_sparse(path, other)
        state = files.masked_state(other)
        assert same_state({k: v for k,v in state.items() if not k.endswith('_sparsity')}, model.state_dict())
        assert all(abs(state[f'{i}.weight_sparsity']-0.7)<0.02 for i in (0, 2, 4))
    load_sparse_state(twin := mlp(8,24,20,3), model.state_dict())
    assert not changed(snapshot(model), {k: v for k,v in snapshot(twin).items() if not k.endswith('_sparsity')})

class Tied(nn.Module):
    def __init__(self): super().__init__(); self.emb,self.out = nn.Embedding(300, 16),nn.Linear(16, 300, bias=False); self.out.weight = self.emb.weight
    def forward(self, x): return self.out(self.emb(x))

def tied(seed=0, sparsity=0.9, steps=2):
    torch.manual_seed(seed)
    model = Tied()
    sparsify_model(model, sparsity)
    opt = torch.optim.Adam(model.parameters())
    for x,y in batches(steps, n_out=300):
        opt.zero_grad()
        F.cross_entropy(model(y), y).backward()
        DSTMethod(**Static_presets).step(model, opt, 1, 0.)
    return model,opt

def test_a_tied_model_is_small_and_stays_tied(tmp_path):
    (model,opt),(twin,twin_opt) = tied(),tied(1, 0.5)
    path = save_sparse(model, tmp_path/'m', opt)
    assert path.stat().st_size<0.16*3*4*300*16                                              # weights and two moments
    state = load_sparse(path)
    assert same_state(state, model.state_dict()) and state['emb.weight'].data_ptr()==state['out.weight'].data_ptr()
    load_sparse(path, twin, twin_opt)
    assert twin.out.weight is twin.emb.weight and not changed(snapshot(model, opt), snapshot(twin, twin_opt))

@pytest.mark.parametrize('left', ['emb.weight', 'out.weight'])
def test_a_tied_state_with_one_name(left):
    "As Hugging Face writes it"
    model,_ = tied()
    state = {k: v for k,v in model.state_dict().items() if k!={'emb.weight': 'out.weight', 'out.weight': 'emb.weight'}[left]}
    load_sparse_state(twin := Tied(), state)
    assert not changed(snapshot(model), snapshot(twin)) and twin.out.weight is twin.emb.weight
    with pytest.raises(ValueError, match="'out.weight_mask' is not in the model"): load_sparse_state(Tied(), {k: v for k,v in state.items() if k!=left})

def test_hugging_face_writes_a_tied_model(tmp_path):
    T = pytest.importorskip('transformers')
    make = lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0))
    sparsify_model(model := make(), .8)
    model.save_pretrained(tmp_path)
    load_sparse_state(twin := make(), load_file(tmp_path/'model.safetensors'))
    assert not changed(snapshot(model), snapshot(twin))

class Around(nn.Module):
    "As `DataParallel` and `DistributedDataParallel` hold a model"
    def __init__(self, module): super().__init__(); self.module = module
def part_compiled(model): model[2] = torch.compile(model[2]); return model
WRAPPED = dict(plain=lambda m: m, compiled=torch.compile, around=Around, both=lambda m: torch.compile(Around(m)), compiled_within=lambda m: Around(torch.compile(m)), part=part_compiled)
@pytest.mark.parametrize('source', WRAPPED)
@pytest.mark.parametrize('target', WRAPPED)
def test_files_go_between_wrappers(source, target, tmp_path):
    model,twin = sparse_mlp(0.8),sparse_mlp(0.5, seed=1)
    opt,twin_opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9),torch.optim.SGD(twin.parameters(), lr=.1, momentum=.9)
    backward(model, *batches(1)[0])
    DSTMethod(**Static_presets).step(model, opt, 1, 0.)
    expected = snapshot(model, opt)
    wrapped,other = WRAPPED[source](model),WRAPPED[target](twin)
    path = save_sparse(wrapped, tmp_path/'m', opt)
    assert not any('_orig_mod' in k for k in load_sparse(path))
    load_sparse(path, other, twin_opt)
    if target!='part': assert not changed(expected, snapshot(twin, twin_opt))
    assert same_state(dict(enumerate(model.state_dict().values())), dict(enumerate(twin.state_dict().values())))
    load_sparse_state(other, wrapped.state_dict())
    assert same_state(dict(enumerate(model.state_dict().values())), dict(enumerate(twin.state_dict().values())))

def test_a_model_with_a_part_named_module(tmp_path):
    "Its name is no wrapper's"
    make = lambda seed: nn.ModuleDict(dict(module=sparse_mlp(seed=seed), other=nn.Linear(2, 2)))
    model = make(0)
    load_sparse(save_sparse(model, tmp_path/'m'), twin := make(1))
    assert not changed(snapshot(model), snapshot(twin))

def test_a_mask_that_a_compressed_layer_has_no_room_for(saved, tmp_path):
    path = forge(saved[2], _orphan_bias, tmp_path/'forged')
    assert '0.bias_mask' in load_sparse(path, mlp(8, 12, 3)).state_dict()
    model = in_layers(sparse_mlp(sizes=(8, 12, 3)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'0.bias_mask' is in a compressed layer"): load_sparse(path, model)
    assert not changed(before, snapshot(model))

def test_an_optimizer_alone(saved):
    with pytest.raises(ValueError, match='together with its model'): load_sparse(saved[2], opt=saved[1])

# ------------------------------------------------------------ many processes, one name
def together(*fs):
    "Run functions in threads at the same time; what each returned, or raised"
    with ThreadPoolExecutor(len(fs)) as pool: return [f.exception() or f.result() for f in [pool.submit(f) for f in fs]]

def test_several_savers_and_readers_of_one_name(tmp_path):
    path,models = tmp_path/'m', [sparse_mlp(0.5, seed=i) for i in range(3)]
    states = [m.state_dict() for m in models]
    save_sparse(models[0], path)
    def saver(m): return lambda: [save_sparse(m, path) for _ in range(40)]
    def reader(): return [any(same_state(read, s) for s in states) for read in (load_sparse(path) for _ in range(60))]
    done = together(*map(saver, models), reader, reader)
    assert not [e for e in done if isinstance(e, Exception)] and all(sum(done[3:], []))
    assert [p.name for p in tmp_path.iterdir()]==['m']

@pytest.mark.skipif(os.name!='posix', reason='files have no mode')
@pytest.mark.parametrize('mask, mode', [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_usual_mode(mask, mode, tmp_path):
    before = os.umask(mask)
    try: paths = save_sparse(sparse_mlp(), tmp_path/'m'),atomic_save(dict(a=1), tmp_path/'c')
    finally: os.umask(before)
    assert [p.stat().st_mode&0o777 for p in paths]==[mode, mode]

@pytest.mark.parametrize('write', [lambda path: path.write_text('new'), lambda path: torch.save(dict(a=1), path)])
def test_a_planted_link_is_not_followed(write, tmp_path, monkeypatch):
    "Neither one under a name that can be told beforehand, nor one under the name that is drawn"
    (tmp_path/'precious').write_text('old')
    drawn = f'.m.{platform.node()}.{os.getpid()}.00.part'
    for name in ('.m.part', drawn): (tmp_path/name).symlink_to(tmp_path/'precious')
    atomic_write(tmp_path/'m', write)
    monkeypatch.setattr(os, 'urandom', lambda n: b'\0')
    with pytest.raises(FileExistsError): atomic_write(tmp_path/'m', write)
    assert (tmp_path/'precious').read_text()=='old' and (tmp_path/drawn).is_symlink() and (tmp_path/'m').stat().st_size

def test_a_failed_write_leaves_nothing(tmp_path):
    def fails(path): path.write_text('half'); raise RuntimeError('disk')
    with pytest.raises(RuntimeError, match='disk'): atomic_write(tmp_path/'m', fails)
    assert not list(tmp_path.iterdir())
