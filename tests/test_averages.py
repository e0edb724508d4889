"Averages of weights, target networks, and other copies of a sparse model: whose masks they have"
import copy, gc, pickle, warnings
from functools import partial
import pytest, torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from helpers import backward, batches, masked_are_zero, masks, nnz, plain_loop, same_masks, sparse_mlp
from sparsefast.average import follow_masks
from sparsefast.copies import MaskFollower
from sparsefast.guard import enforce_masks, guards
from sparsefast.masks import masked_params
from sparsefast.methods import DSTMethod
from sparsefast.presets import GMP_presets, SET_presets
from sparsefast.see.doctor import sparse_doctor
from sparsefast.ship.export import bake
from sparsefast.sparsify import load_sparse_state, sparsify_model, unsparsify_model
from sparsefast.storage import to_sparse_layers

D = .8
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
MOVING = partial(DSTMethod, **{**SET_presets, 'batches_per_update': 3})

@torch.no_grad()
def params_only(average, model):
    "BYOL, MoCo, DQN"
    for p,q in zip(average.parameters(), model.parameters()): p.lerp_(q, 1-D)
@torch.no_grad()
def silently(average, model):
    for p,q in zip(average.parameters(), model.parameters()): p.data.mul_(D).add_(q.data, alpha=1-D)
@torch.no_grad()
def floats_only(average, model):
    "YOLO"
    state = model.state_dict()
    for k,v in average.state_dict().items():
        if v.dtype.is_floating_point: v *= D; v += (1-D)*state[k].detach()
def timm_average(name, **kw):
    def make(model):
        pytest.importorskip('timm')
        import timm.utils
        return getattr(timm.utils, name)(model, decay=D, **kw)
    return make
update_timm = lambda average, model: average.update(model)
update_torch = lambda average, model: average.update_parameters(model)

RULES = dict(
    params=(copy.deepcopy, params_only), silent=(copy.deepcopy, silently), yolo=(copy.deepcopy, floats_only),
    torch_=(partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(D)), update_torch), torch_buffers=(partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(D), use_buffers=True), update_torch),
    torch_one=(partial(AveragedModel, avg_fn=get_ema_avg_fn(D), use_buffers=True), update_torch), torch_swa=(AveragedModel, update_torch),
    v2=(timm_average('ModelEmaV2'), update_timm), v3=(timm_average('ModelEmaV3'), update_timm), v3_params=(timm_average('ModelEmaV3', exclude_buffers=True), update_timm))
CUT,UNION = {'params', 'silent', 'yolo'},{'torch_buffers', 'torch_one', 'v2'}

def train(model, average, update, steps=24):
    "Returns the plain average of each weight, over the same steps"
    plain = [p.detach().clone() for p in model.parameters()]
    def every(step):
        update(average, model)
        for p,q in zip(plain, model.parameters()): p.lerp_(q.detach(), 1-D)
    always = [m.clone() for m in masks(model)]
    def look(step):
        every(step)
        for a,m in zip(always, masks(model)): a &= m
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), steps, look)
    return plain,always

@pytest.mark.parametrize('late', [False, True], ids=['', 'made before sparsify_model'])
@pytest.mark.parametrize('rule', RULES)
def test_an_average_follows_the_masks_of_its_model(rule, late):
    make,update = RULES[rule]
    model = sparse_mlp()
    if late: unsparsify_model(model)
    average = make(model)
    if late: sparsify_model(model, .6)
    first = masks(model)
    assert follow_masks(average, model) is average
    plain,always = train(model, average, update)
    assert same_masks(masks(average), masks(model)) and not same_masks(first, masks(model))
    assert nnz(model)==nnz(sparse_mlp())                                                     # nothing has been written into the model's masks
    assert [float(m.weight_sparsity) for m,*_ in masked_params(model)]==[float(m.weight_sparsity) for m,*_ in masked_params(sparse_mlp())]
    with torch.no_grad(): average.eval()(X)
    assert masked_are_zero(average)
    if rule=='torch_swa': return
    inner = getattr(average, 'module', average)
    got = {id(p): p for p in inner.parameters()}
    weights = [p for *_,p,_ in masked_params(inner)]
    want = [w for w in plain if w.dim()==2]
    for w,p,a in zip(want, weights, always):
        assert int(a.sum())>10
        if not late: assert torch.allclose(p[a], w[a], atol=1e-6) or rule=='torch_buffers' or rule in ('torch_','torch_one')

@pytest.mark.parametrize('rule', RULES)
def test_an_average_that_follows_nobody(rule):
    "It is right, or a word is said before anything is cut off"
    make,update = RULES[rule]
    model = sparse_mlp()
    average = make(model)
    train(model, average, update)
    before = [p.detach().clone() for p in average.parameters()]
    def forward():
        with torch.no_grad(): average.eval()(X)
    if rule in CUT:
        with pytest.raises(ValueError, match=r'follow_masks\(copy, model\)'): forward()
        assert all(torch.equal(a, b) for a,b in zip(before, average.parameters()))
    elif rule in UNION:
        with pytest.warns(UserWarning, match=r'averaged like numbers.*follow_masks'): forward()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            forward()
        assert same_masks(masks(average), masks(model))
    if rule in CUT|UNION: assert [f.kind for f in sparse_doctor(getattr(average, 'module', average)) if f.kind=='average'] and not sparse_doctor(getattr(average, 'module', average)).healthy
    follow_masks(average, model)
    forward()
    assert same_masks(masks(average), masks(model)) and masked_are_zero(average)
    assert not [f for f in sparse_doctor(getattr(average, 'module', average)) if f.kind in ('average', 'masked weights')]

def test_a_target_in_training_mode_is_refused_too():
    model = sparse_mlp()
    target = copy.deepcopy(model)
    train(model, target, params_only)
    with pytest.raises(ValueError, match='follow_masks'): target.train()(X)
    with pytest.raises(ValueError, match='follow_masks'): target[2](torch.randn(2, 24))         # a part of it

# ------------------------------------------------------------ copies that are no averages
def test_snapshots_and_models_of_their_own_are_left_alone():
    model = sparse_mlp()
    snapshot,twin,other,loaded = (copy.deepcopy(model) for _ in range(4))
    state = copy.deepcopy(model.state_dict())
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 24)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        plain_loop(twin, torch.optim.SGD(twin.parameters(), lr=.2), MOVING(), 12)             # the engine's own
        plain_loop(other, torch.optim.SGD(other.parameters(), lr=.2), None, 12)               # an optimizer that knows no masks
        loaded.load_state_dict(state)
        for m in (snapshot, twin, other, loaded):
            with torch.no_grad(): m.eval()(X)
            assert masked_are_zero(m)
    assert same_masks(masks(snapshot), [state[f'{i}.weight_mask'] for i in (0,2,4)]) and not sparse_doctor(snapshot)

def test_enforce_masks_makes_a_copy_a_model_of_its_own():
    model = sparse_mlp()
    twin = copy.deepcopy(model)
    train(model, twin, params_only)
    enforce_masks(twin)
    twin(X)
    assert masked_are_zero(twin)

def test_a_copy_of_a_part_leaves_the_rest_behind():
    model = sparse_mlp()
    part = copy.deepcopy(model[2])
    (_,_,guard), = guards(part)
    assert guard.whole is None and guard.where==[part]
    part.weight.data.fill_(1.)
    part(torch.randn(2, 24))
    assert masked_are_zero(part)

def test_an_origin_that_is_gone():
    model = sparse_mlp()
    twin = copy.deepcopy(model)
    train(model, twin, params_only)
    del model
    gc.collect()
    twin(X)
    assert masked_are_zero(twin)

# ------------------------------------------------------------ what follows can be saved, loaded, copied and shipped
def test_a_follower_can_be_saved_loaded_copied_and_baked():
    model = sparse_mlp()
    average = follow_masks(copy.deepcopy(model), model)
    first = copy.deepcopy(average.state_dict())
    train(model, average, params_only)
    now = masks(model)
    state = average.state_dict()
    assert all(torch.equal(state[f'{i}.weight_mask'], m) and (state[f'{i}.weight'][~m]==0).all() for i,m in zip((0,2,4), now))
    baked = bake(average)
    assert not any([h for m in baked.modules() for h in (m._forward_pre_hooks, m._forward_hooks, m._state_dict_pre_hooks, m._load_state_dict_pre_hooks)])
    assert all(torch.equal(baked[i].weight, average[i].weight*m) for i,m in zip((0,2,4), now))
    for twin in (copy.deepcopy(average), pickle.loads(pickle.dumps(average))):
        twin.load_state_dict(first)                                                          # a copy follows nobody
        twin(X)
        assert same_masks(masks(twin), [first[f'{i}.weight_mask'] for i in (0,2,4)])
    average.load_state_dict(first)
    assert same_masks(masks(model), now)                                                     # loading an average does not change the model
    average(X)
    assert same_masks(masks(average), now) and masked_are_zero(average)
    follow_masks(average, model)                                                             # again: hooks are replaced
    assert sum(isinstance(h, MaskFollower) for h in average._forward_pre_hooks.values())==1==len(average._state_dict_pre_hooks)
    load_sparse_state(average, first)                                                        # goes on following
    average(X)
    assert same_masks(masks(average), now)
    assert torch.allclose(torch.compile(average, backend='eager')(X), average(X))
    del model, state
    gc.collect()
    average(X)
    unsparsify_model(average)(X)

def test_on_another_device():
    "Masks are copied there, before each state that is saved"
    model = sparse_mlp()
    average = follow_masks(copy.deepcopy(model), model).to('meta')
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 12)
    state = average.state_dict()
    assert state['0.weight_mask'].is_meta and not model[0].weight_mask.is_meta

def test_what_cannot_follow_is_refused():
    model = sparse_mlp()
    with pytest.raises(ValueError, match='got the model itself'): follow_masks(model, model)
    with pytest.raises(ValueError, match='model must be sparse'): follow_masks(copy.deepcopy(model), unsparsify_model(copy.deepcopy(model)))
    with pytest.raises(ValueError, match=r"without its '4.weight'"): follow_masks(sparse_mlp(sizes=(8,24,20)), model)
    compressed = copy.deepcopy(model)
    assert to_sparse_layers(compressed, least=0.)
    with pytest.raises(ValueError, match='to_masked_layers'): follow_masks(copy.deepcopy(model), compressed)
    other = unsparsify_model(sparse_mlp()); sparsify_model(other, .6, exclude=[other[0]])
    average = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"got one of '0.weight'"): follow_masks(average, other)
    assert not any(isinstance(h, MaskFollower) for h in average._forward_pre_hooks.values())

def test_inside_the_model_that_trains():
    "A momentum encoder beside the encoder, with masks from it"
    torch.manual_seed(0)
    net = nn.ModuleDict(dict(encoder=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), momentum=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))))
    net.momentum.load_state_dict(net.encoder.state_dict())
    net.momentum.requires_grad_(False)
    sparsify_model(net, .6, exclude='momentum.*')
    follow_masks(net.momentum, net.encoder)
    opt,method = torch.optim.SGD(net.encoder.parameters(), lr=.1),MOVING()
    for step in range(1, 13):
        opt.zero_grad()
        (net.encoder(X)-net.momentum(X.flip(0)).detach()+1).square().mean().backward()
        method.step(net.encoder, opt, step, total=100)
        params_only(net.momentum, net.encoder)
    net.momentum(X)
    assert same_masks(masks(net.momentum), masks(net.encoder)) and masked_are_zero(net)
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())

# ------------------------------------------------------------ averages that nobody runs, and that come back into the model
def said(f):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        f()
    return [str(w.message) for w in seen if 'copy of a sparse model' in str(w.message)]

@pytest.mark.parametrize('rule', RULES)
def test_the_model_looks_at_its_averages(rule):
    "While it trains, once, whether they are run or not"
    make,update = RULES[rule]
    model = sparse_mlp()
    average = make(model)
    told = said(lambda: train(model, average, update))
    assert len(told)==(rule in UNION) and all('averaged like numbers' in t and 'use_buffers=False' in t and 'follow_masks' in t for t in told)
    follow_masks(average, model)
    assert not said(lambda: train(model, average, update))

def test_one_update_is_enough_and_the_last_step_looks():
    make,update = RULES['torch_one']
    model = sparse_mlp()
    average = make(model)
    def go(): plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), DSTMethod(**{**SET_presets, 'batches_per_update': 5}), 8, lambda step: update(average, model))
    assert len(said(go))==1

def test_masks_averaged_without_a_trace():
    model = sparse_mlp()
    average = copy.deepcopy(model)
    def every(step):
        for a,b in zip([*average.parameters(), *average.buffers()], [*model.parameters(), *model.buffers()]): a.data.copy_(D*a.data+(1-D)*b)
    assert len(said(lambda: plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 24, every)))==1

def test_masks_that_only_shrink():
    "Then the average has as many active weights as it had at first"
    make,update = RULES['torch_one']
    model = sparse_mlp()
    unsparsify_model(model); sparsify_model(model, .8, initial_sparsity=.2)
    average,best = make(model),copy.deepcopy(model)
    def every(step):
        update(average, model)
        if step in (1, 8, 14): best.load_state_dict(model.state_dict())
    def go(): plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), DSTMethod(**{**GMP_presets, 'batches_per_update': 3}), 20, every)
    assert len(said(go))==1 and sum(nnz(average))>sum(nnz(model))

def test_copies_that_are_no_averages_are_looked_at_in_silence():
    model = sparse_mlp()
    snapshot,best,twin,other = (copy.deepcopy(model) for _ in range(4))
    def every(step):
        if step%7==0: best.load_state_dict(model.state_dict())
        plain_loop(twin, torch.optim.SGD(twin.parameters(), lr=.2), MOVING(), 1)
        plain_loop(other, torch.optim.SGD(other.parameters(), lr=.2), None, 1)
    assert not said(lambda: plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 24, every))

def test_a_state_that_was_averaged_is_refused():
    "Masks that became numbers between 0 and 1; before anything is loaded"
    model = sparse_mlp()
    state = copy.deepcopy(model.state_dict())
    def every(step):
        for k,v in model.state_dict().items(): state[k] = D*state[k]+(1-D)*v
    plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 12, every)
    for net,prefix in ((model, ''), (nn.ModuleDict(dict(net=model)), 'net.')):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=rf'`{prefix}0.weight_mask` must be ones and zeros, got an average of masks: .*take the masks from the model'): net.load_state_dict({prefix+k: v for k,v in state.items()})
        assert all(torch.equal(a, b) for a,b in zip(before.values(), net.state_dict().values()))
    model.load_state_dict({k: v if k.endswith('weight') else model.state_dict()[k].double() for k,v in state.items()})
    model(X)
    assert masked_are_zero(model) and not any(m._load_state_dict_pre_hooks for m in bake(model).modules())

def compressed(): to_sparse_layers(model := sparse_mlp(), least=0.); return model
STORED = dict(params=(copy.deepcopy, params_only), silent=(copy.deepcopy, silently), torch_=RULES['torch_'], v2=RULES['v2'])
@pytest.mark.parametrize('rule', STORED)
@pytest.mark.parametrize('run', ['in training', 'afterwards', 'each time', 'training mode'])
def test_averages_of_compressed_layers(rule, run):
    "An update moves values to other places: said at the next update, or when the average is run"
    make,update = STORED[rule]
    model = compressed()
    average = make(model)
    def use(mode=False):
        "An index that was averaged like numbers is no index, which the kernel refuses"
        try:
            with torch.no_grad(): average.train(mode)(X)
        except ValueError as e: assert rule=='v2' and 'the index must have' in str(e)
    def each(step):
        update(average, model)
        if run=='each time': use()
    def go(n, **kw): plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), DSTMethod(**{**SET_presets, 'batches_per_update': 5, **kw}), n, each)
    assert not said(lambda: go(4))
    told = said(lambda: go(20 if run=='in training' else 9, stop_pct=.9))
    if run in ('afterwards', 'training mode'):
        told = said(lambda: use(run=='training mode'))
        average.eval()
    assert len(told)==1 and 'compressed' in told[0] and 'to_masked_layers' in told[0], told
    assert [f.kind for f in sparse_doctor(getattr(average, 'module', average)) if f.kind=='average']
    enforce_masks(getattr(average, 'module', average))
    assert not said(use)

def test_an_average_of_compressed_layers_is_looked_at_whenever_it_runs():
    model = compressed()
    average,opt = copy.deepcopy(model),torch.optim.SGD(model.parameters(), lr=.2)
    def run():
        with torch.no_grad(): average.eval()(X)
    def go(steps):
        for step in steps:
            backward(model, *batches(1)[0])
            DSTMethod(**{**SET_presets, 'batches_per_update': 5}).step(model, opt, step, total=100)
            params_only(average, model)
    assert [len(said(f)) for f in (run, lambda: go(range(1, 5)), run, lambda: go([5, 6]), run, run)]==[0, 0, 0, 0, 1, 0]

def test_copies_of_compressed_layers_that_are_no_averages():
    model = compressed()
    snapshot,twin,static = (copy.deepcopy(model) for _ in range(3))
    plain_loop(twin, torch.optim.SGD(twin.parameters(), lr=.2), MOVING(), 3)
    def every(step): plain_loop(twin, torch.optim.SGD(twin.parameters(), lr=.2), MOVING(), 1)
    def go():
        plain_loop(static, torch.optim.SGD(static.parameters(), lr=.2), MOVING(stop_pct=0.), 3)
        plain_loop(model, torch.optim.SGD(model.parameters(), lr=.2), MOVING(), 12, every)
        for m in (snapshot, twin, static): m.eval()(X)
    assert not said(go)

@pytest.mark.parametrize('kind', ['numbers', 'copied buffers', 'followed'])
def test_lightnings_average(kind, tmp_path):
    "By default it averages buffers like numbers, and copies them into the model: said while the model trains"
    L = pytest.importorskip('lightning.pytorch')
    from lightning.pytorch.callbacks import EMAWeightAveraging
    class Lit(L.LightningModule):
        def __init__(self): super().__init__(); self.net,self.step,self.seen = sparse_mlp(),0,[]; self.automatic_optimization = False
        def training_step(self, batch, i):
            opt = self.optimizers(use_pl_optimizer=False); opt.zero_grad()
            nn.functional.cross_entropy(self.net(batch[0]), batch[1]).backward()
            self.step += 1
            MOVING().before_step(self.net, opt, self.step, total=100)
            self.optimizers().step()
            MOVING().after_step(self.net, opt, self.step, total=100)
        def validation_step(self, batch, i): self.net(batch[0]); self.seen.append(sum(nnz(self.net)))
        def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), lr=.2)
    class SparseEMA(EMAWeightAveraging):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            if stage=='fit': follow_masks(self._average_model, pl_module)
    lit,cb = Lit(),SparseEMA(decay=D) if kind=='followed' else EMAWeightAveraging(decay=D, use_buffers=kind=='numbers')
    n,first = sum(nnz(lit.net)),masks(lit.net)
    data = batches(12)
    told = said(lambda: L.Trainer(max_epochs=1, callbacks=[cb], logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, accelerator='cpu').fit(lit, iter(data), torch.utils.data.DataLoader(data[:1], batch_size=None)))
    if kind=='numbers':
        assert len(told)==1 and 'averaged like numbers' in told[0] and 'use_buffers=False' in told[0] and sum(nnz(lit.net))>n
        return
    assert not told
    with torch.no_grad(): lit.net.eval()(X)
    assert sum(nnz(lit.net))==n and not same_masks(first, masks(lit.net)) and masked_are_zero(lit.net) and set(lit.seen)=={n}
