"Loops that own the call of the optimizer's step"
import copy, gc, io, json, re
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
from sparsefast.all import *
from sparsefast.methods import DSTMethod
from sparsefast.optim import attached_to
from helpers import *

def method_of(preset, **kw): return DSTMethod(**{**PRESETS[preset], 'batches_per_update': 8, **kw})

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('opt', ['momentum', 'nesterov', 'adam', 'adamw', 'rmsprop'])
def test_equals_the_plain_loop(preset, opt):
    model,twin = sparse_mlp(),sparse_mlp()
    opts = [TORCH_OPTS[opt](m.parameters()) for m in (model, twin)]
    m = method_of(preset)
    plain_loop(twin, opts[1], m, 40)
    attached = attach(m, model, opts[0], 40)
    for x,y in batches(40):
        backward(model, x, y)
        opts[0].step()
        assert masked_are_zero(model) and all(p.grad is not None for p in model.parameters())
    assert not changed(snapshot(model, opts[0]), snapshot(twin, opts[1])) and attached.step==40

def test_interval_as_a_share_of_training():
    "A tenth of forty steps is each four"
    model,twin = sparse_mlp(),sparse_mlp()
    opt,other = (torch.optim.SGD(m.parameters(), lr=.05, momentum=.9) for m in (model, twin))
    attached = attach(method_of('RigL', batches_per_update=.1), model, opt, 40)
    for x,y in batches(40): backward(model, x, y); opt.step()
    plain_loop(twin, other, method_of('RigL', batches_per_update=4), 40)
    assert attached.method.batches_per_update==4 and not changed(snapshot(model, opt), snapshot(twin, other))

def test_once_an_epoch_is_no_interval_that_can_be_known():
    model = sparse_mlp()
    with pytest.raises(ValueError, match='once an epoch.*per_epoch'): attach(DSTMethod(batches_per_update=None), model, torch.optim.SGD(model.parameters(), lr=.1), 40)

def test_grad_scaler():
    "The scaler steps, or does not: an overflow is no optimizer step"
    model,twin = sparse_mlp(),sparse_mlp()
    opt,other = (torch.optim.SGD(m.parameters(), lr=.05, momentum=.9) for m in (model, twin))
    attached,scaler = attach(method_of('RigL'), model, opt, 40),torch.amp.GradScaler('cpu', init_scale=8.)
    data = batches(40)
    for i,(x,y) in enumerate(data[:20]*1):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)*(float('inf') if i==5 else 1.)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        assert masked_are_zero(model)
    assert attached.step==19
    plain_loop_steps = [d for i,d in enumerate(data[:20]) if i!=5]
    for step,(x,y) in enumerate(plain_loop_steps, 1):
        backward(twin, x, y)
        method_of('RigL').step(twin, other, step, (step-1)/40)
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(model.state_dict().values(), twin.state_dict().values())) and same_masks(masks(model), masks(twin))

def test_removed():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    attached = attach(method_of('SET', batches_per_update=1), model, opt, 10)
    attached.remove()
    before = masks(model)
    for x,y in batches(3): backward(model, x, y); opt.step()
    assert same_masks(before, masks(model)) and attached.step==0

def test_resumed():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    attached = attach(method_of('SET'), model, opt, 40)
    for x,y in batches(40)[:20]: backward(model, x, y); opt.step()
    attached.remove()
    attached = attach(method_of('SET'), model, opt, 40, step=attached.step)
    for x,y in batches(40)[20:]: backward(model, x, y); opt.step()
    twin = sparse_mlp()
    plain_loop(twin, other := torch.optim.SGD(twin.parameters(), lr=.05, momentum=.9), method_of('SET'), 40)
    assert not changed(snapshot(model, opt), snapshot(twin, other))

@pytest.mark.parametrize('total', [0, -3, 2.5, None])
def test_bad_total(total):
    model = sparse_mlp()
    with pytest.raises(ValueError, match='total must be the number of optimizer steps'): attach(method_of('SET'), model, torch.optim.SGD(model.parameters(), lr=.1), total)

def test_fastai_optimizer():
    from fastai.optimizer import SGD
    model = sparse_mlp()
    with pytest.raises(ValueError, match='no step hooks.*DynamicSparseTrainingCallback'): attach(method_of('SET'), model, SGD(list(model.parameters()), lr=.1), 10)

def test_dense_model():
    model = mlp(4, 4)
    with pytest.raises(ValueError, match='must have a mask'): attach(method_of('SET'), model, torch.optim.SGD(model.parameters(), lr=.1), 10)

# ------------------------------------------------------------ the recipes of the notebook, as they stand there
def recipe(title, **names):
    "What the notebook says under a heading, run with `names` for what it takes for granted"
    cells = json.loads((Path(__file__).parents[1]/'nbs/05b_attach.ipynb').read_text())['cells']
    code = re.search(rf'## {title}\n.*?```python\n(.*?)```', '\n'.join(''.join(c['source']) for c in cells), re.S)[1]
    assert 3<=len(code.splitlines())<=15
    exec(code, names := dict(vars(__import__('sparsefast.core', fromlist=['x'])), torch=torch, RigL_presets={**RigL_presets, 'batches_per_update': 8}, **names))
    return names

@pytest.mark.filterwarnings('ignore')
def test_hugging_face_trainer(tmp_path):
    "After every step as many weights as at the start; and a training that is cut off and resumed by the `Trainer` ends with the same bits"
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    class Net(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.net = mlp(8, 24, 20, 3)
        def forward(self, x, labels): out = self.net(x); return dict(loss=F.cross_entropy(out, labels), logits=out)
    ds = [dict(x=x, labels=y) for xs,ys in batches(10) for x,y in zip(xs, ys)]
    def run(resume=None):
        model,seen = Net(),[]
        class Look(transformers.TrainerCallback):
            def on_step_end(self, *args, **kw): seen.append((sum(nnz(model)), masked_are_zero(model), masks(model)))
        class Resumed(transformers.Trainer):
            def __init__(self, *args, **kw): super().__init__(*args, callbacks=[Look()], **kw)
            def train(self): return super().train(resume_from_checkpoint=resume)
        args = lambda _, max_steps: transformers.TrainingArguments(str(tmp_path), max_steps=max_steps//25, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=20, gradient_accumulation_steps=2)
        found = recipe('Hugging Face', TrainingArguments=args, Trainer=Resumed, model=model, ds=ds)
        return model,found['opt'],found['attached'],seen
    model,opt,attached,seen = run()
    n = round(.1*n_params(model))
    assert attached.step==attached.total==len(seen)==40 and all(abs(k-n)<=1 and ok for k,ok,_ in seen) and not any(torch.equal(a, b) for a,b in zip(seen[0][2], masks(model)) if a.sum()>12) and not dead_state(model, opt)
    again,other,resumed,seen = run(str(tmp_path/'checkpoint-20'))
    assert resumed.step==40 and len(seen)==20 and not changed(snapshot(model, opt), snapshot(again, other))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('accumulate', [1, 2])
def test_lightning(tmp_path, accumulate):
    "Its automatic optimisation is the plain loop, bit for bit after every step; and so is a training that it resumes"
    L = pytest.importorskip('lightning')
    class Classifier(recipe('Lightning', L=L)['Classifier']):
        def __init__(self): super().__init__(); self.model,self.seen = sparse_mlp(),[]
        def training_step(self, batch, i): return F.cross_entropy(self.model(batch[0]), batch[1])
        def on_train_batch_end(self, *args): self.seen.append(snapshot(self.model, self.optimizers().optimizer)); assert masked_are_zero(self.model) and not dead_state(self.model, self.optimizers().optimizer)
    data = batches(10)
    x,y = map(torch.cat, zip(*data))
    def fit(resume=None):
        keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, '{epoch}', save_top_k=-1)
        trainer = L.Trainer(max_epochs=3, accelerator='cpu', logger=False, callbacks=keep, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=accumulate)
        trainer.fit(module := Classifier(), torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=8), ckpt_path=resume, weights_only=False)
        return module
    module,twin,n = fit(),sparse_mlp(),30//accumulate
    assert module.attached.total==module.attached.step==n and nnz(module.model)==nnz(twin) and not same_masks(masks(twin), masks(module.model))
    opt = torch.optim.AdamW(twin.parameters(), lr=5e-4)
    for i,(a,b) in enumerate(data*3, 1):
        (F.cross_entropy(twin(a), b)/accumulate).backward()
        if i%accumulate: continue
        method_of('RigL').step(twin, opt, i//accumulate, total=n)
        assert not changed(module.seen[i-1], snapshot(twin, opt))
        opt.zero_grad()
    again = fit(str(tmp_path/'epoch=1.ckpt'))
    assert again.attached.step==n and len(again.seen)==10 and not changed(module.seen[-1], again.seen[-1])

@pytest.mark.filterwarnings('ignore')
def test_accelerate(tmp_path):
    "Its wrapper around the optimizer, and its `save_state` and `load_state`"
    accelerate = pytest.importorskip('accelerate')
    def made():
        acc,model = accelerate.Accelerator(cpu=True),sparse_mlp()
        model,opt = acc.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        return acc, model, opt, attach(method_of('RigL'), model, opt, 40)
    def go(acc, model, opt, data):
        for x,y in data:
            opt.zero_grad()
            acc.backward(F.cross_entropy(model(x), y))
            opt.step()
    acc,model,opt,attached = made()
    go(acc, model, opt, batches(40)[:20])
    acc.save_state(str(tmp_path))
    go(acc, model, opt, batches(40)[20:])
    other = made()
    other[0].load_state(str(tmp_path))
    assert other[-1].step==20
    go(*other[:3], batches(40)[20:])
    assert other[-1].step==attached.step==40 and not changed(snapshot(model, opt), snapshot(other[1], other[2])) and not dead_state(model, opt)

@pytest.mark.parametrize('method', ['rigl', RigL_presets], ids=['name', 'dict'])
def test_a_method_by_name_and_a_learner(method):
    learn = learner()
    opt = torch.optim.SGD(learn.model.parameters(), lr=.1)
    assert attach(method, learn, opt, 1000).method==DSTMethod(**RigL_presets).in_steps(1000)

# ------------------------------------------------------------ closures: gradients that are made within the step
ALL = dict(PRESETS, RigL_avg={**RigL_avg_presets, 'batches_per_update': 8}, TopKAST={**TopKAST_presets, 'batches_per_update': 3}, SR_STE=SR_STE_presets, GMP=GMP_presets, DSR=DSR_presets)
def any_method(name, **kw): return method_of(name, **kw) if name in PRESETS else DSTMethod(**{**ALL[name], 'batches_per_update': 5, **kw})
def model_of(name):
    torch.manual_seed(0)
    model = mlp(8,24,20,4)
    sparsify_model(model, .5, **any_method(name).sparsify_kwargs(.5))
    return model

def closure_of(model, opt, x, y):
    def run():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    return run

def dead_state(model, opt): return [k for p,mask,_ in sparse_params(model) for k,t in opt_tensors(opt, p).items() if t[~mask].any()]

@pytest.mark.parametrize('preset', ALL)
@pytest.mark.parametrize('opt', ['momentum', 'adamw'])
@pytest.mark.parametrize('by_name', [False, True], ids=['step(f)', 'step(closure=f)'])
def test_a_closure_equals_the_plain_loop(preset, opt, by_name):
    "Weights, masks and optimizer state, bit for bit; a step whose place an update takes is not taken"
    (model,a),(twin,b) = [(m, TORCH_OPTS[opt](m.parameters())) for m in (model_of(preset), model_of(preset))]
    attached,m = attach(any_method(preset), model, a, 40),any_method(preset)
    for step,(x,y) in enumerate(batches(40), 1):
        f,now = closure_of(model, a, x, y),snapshot(model, a)
        loss = a.step(closure=f) if by_name else a.step(f)
        backward(twin, x, y)
        m.step(twin, b, step, total=40)
        assert loss.requires_grad and not changed(snapshot(model, a), snapshot(twin, b)) and attached.step==step
        if preset not in ('SNFS', 'TopKAST', 'SR_STE'): assert masked_are_zero(model) and not dead_state(model, a)
        if preset=='RigL' and step==8: assert not [k for k in changed(now, snapshot(model, a)) if 'bias' in k]
    assert not same_masks(masks(model), masks(model_of(preset)))

class TwicePerStep(torch.optim.SGD):
    "Sharpness-aware: the step is taken with the gradient at a place uphill of the weights, so that the closure runs twice"
    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss,ps = closure(),[p for g in self.param_groups for p in g['params']]
        uphill = [(p, .05*p.grad) for p in ps if p.grad is not None]
        for p,e in uphill: p.add_(e)
        closure()
        for p,e in uphill: p.sub_(e)
        super().step()
        return loss

class SAM(torch.optim.Optimizer):
    "As it is commonly written: it perturbs, and another optimizer steps"
    def __init__(self, params, base, **kw):
        super().__init__(params, kw)
        self.base_optimizer = base(self.param_groups, **kw)
        self.param_groups = self.base_optimizer.param_groups
    @torch.no_grad()
    def first_step(self):
        for p in [p for g in self.param_groups for p in g['params'] if p.grad is not None]:
            self.state[p]['old_p'] = p.data.clone()
            p.add_(p.grad, alpha=.05)
        self.zero_grad()
    @torch.no_grad()
    def second_step(self):
        for p in [p for g in self.param_groups for p in g['params']]: p.data = self.state[p]['old_p']
        self.base_optimizer.step()
    @torch.no_grad()
    def step(self, closure):
        torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()

@pytest.mark.parametrize('preset', ['RigL', 'SET', 'RigL_avg', 'TopKAST', 'SR_STE'])
def test_a_closure_that_runs_twice(preset):
    "A step is counted once, every pass is masked, and an update takes the place of the whole step; weights that train outside the mask are not lost"
    torch.optim.SGD([torch.zeros(1)])                                                         # from here on its own step has hooks, which `super().step()` calls
    model,first = model_of(preset),masks(model_of(preset))
    outside = lambda: sum(b.abs().sum() for n,b in model.named_buffers() if n.endswith('store'))
    size = outside()
    opt = TwicePerStep(model.parameters(), lr=.05, momentum=.9, weight_decay=1e-2)
    attached,m = attach(any_method(preset), model, opt, 40),any_method(preset)
    for step,(x,y) in enumerate(batches(40), 1):
        now = snapshot(model, opt)
        opt.step(closure_of(model, opt, x, y))
        assert masked_are_zero(model) and (m.explore_pct or not dead_state(model, opt))
        assert bool(changed(now, snapshot(model, opt))) and ('model.0.bias' in changed(now, snapshot(model, opt)))==(not m.replaces_step or not m.due(step, total=40))
    assert attached.step==40 and not same_masks(first, masks(model)) and (not m.explore_pct or outside()>.6*size>1)

@pytest.mark.parametrize('preset', ['RigL', 'SET', 'SNFS'])
@pytest.mark.parametrize('by_hand', [False, True], ids=['closure', 'two halves'])
def test_sharpness_aware_around_another_optimizer(preset, by_hand):
    "The one inside steps and has the state: the same run as by hand"
    model,twin = model_of(preset),model_of(preset)
    opt,other = [SAM(m.parameters(), torch.optim.SGD, lr=.05, momentum=.9) for m in (model, twin)]
    attached,m = attach(any_method(preset), model, opt, 40),any_method(preset)
    for step,(x,y) in enumerate(batches(40), 1):
        f = closure_of(model, opt, x, y)
        if by_hand: f(); opt.first_step(); f(); opt.second_step()
        else: opt.step(f)
        f = closure_of(twin, other, x, y)
        f(); other.first_step(); f()
        for p in twin.parameters(): p.data = other.state[p]['old_p']
        m.step(twin, other.base_optimizer, step, total=40)
        assert masked_are_zero(model) and attached.step==step and not changed(snapshot(model, opt.base_optimizer), snapshot(twin, other.base_optimizer))
    assert preset=='SNFS' or not dead_state(model, opt.base_optimizer)

@pytest.mark.parametrize('engine', [False, True], ids=['attach', 'method.step'])
def test_one_history_for_all_weights_is_refused(engine):
    "LBFGS keeps no state of single weights that an update could reset"
    model = sparse_mlp()
    opt,before = torch.optim.LBFGS(model.parameters()),snapshot(model)
    with pytest.raises(ValueError, match='LBFGS.*one history for all weights.*use SGD or Adam'):
        if engine: method_of('RigL').step(model, opt, 1, total=10)
        else: attach(method_of('RigL'), model, opt, 10)
    assert not changed(before, snapshot(model)) and not opt._optimizer_step_pre_hooks

# ------------------------------------------------------------ optimizers that cannot serve, and gradients that are no tensors of the weight's shape
def named(name, **attrs): return type(name, (torch.optim.Adam,), attrs)
@pytest.mark.parametrize('engine', [False, True], ids=['attach', 'method.step'])
@pytest.mark.parametrize('make,why', [(named('AdamW8bit'), 'AdamW8bit: it keeps its state in a few bits.*full precision'), (named('Adam4bit'), 'few bits'), (named('AdamWFp8'), 'few bits'), (named('Adam', args=type('A', (), dict(optim_bits=8))), 'few bits'),
                                      (named('CPUOffloadOptimizer'), 'works during the backward pass'), (named('DeepSpeedZeroOptimizer'), 'DeepSpeed trains flat copies of the weights.*use `fully_shard`'), (named('BF16_Optimizer', __module__='deepspeed.runtime.bf16_optimizer'), 'flat copies')],
                         ids=['8bit', '4bit', 'fp8', 'bits', 'offload', 'deepspeed', 'deepspeed bf16'])
def test_an_optimizer_that_cannot_serve_is_refused(make, why, engine):
    model = sparse_mlp()
    opt,before = make(model.parameters(), lr=.1),snapshot(model)
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match=why):
        if engine: method_of('RigL').step(model, opt, 1, total=10)
        else: attach(method_of('RigL'), model, opt, 10)
    assert not changed(before, snapshot(model)) and not opt.state and not opt._optimizer_step_pre_hooks

@pytest.mark.parametrize('code', [lambda p: torch.zeros(p.shape, dtype=torch.uint8), lambda p: torch.zeros(p.shape).as_subclass(type('Code', (torch.Tensor,), {}))], ids=['integers', 'subclass'])
def test_state_that_is_codes_is_refused_when_training_goes_on(code):
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    opt.state[model[0].weight] = dict(step=torch.tensor(1), state1=code(model[0].weight))
    with pytest.raises(ValueError, match='SGD: it keeps its state in a few bits'): attach(method_of('RigL'), model, opt, 10, step=3)

@pytest.mark.parametrize('kind', ['Adam8bit', 'AdamW8bit', 'AdamW4bit', 'AdamFp8'])
def test_torchao(kind):
    model = sparse_mlp()
    opt = getattr(pytest.importorskip('torchao.optim'), kind)(model.parameters())
    with pytest.raises(ValueError, match=f'{kind}: it keeps its state in a few bits'): attach(method_of('RigL'), model, opt, 10)

@pytest.mark.parametrize('functional', [False, True])
@pytest.mark.parametrize('engine', [False, True], ids=['attach', 'method.step'])
def test_sparse_gradients_are_refused(engine, functional):
    "A layer's own setting before the first step, a function's when it has made one, and nothing is changed"
    class Lookup(nn.Embedding):
        def forward(self, x): return F.embedding(x, self.weight, sparse=True)
    model = nn.Sequential(Lookup(50, 16) if functional else nn.Embedding(50, 16, sparse=True), nn.Flatten(), nn.Linear(64, 3))
    sparsify_model(model, .8, additional_types=[nn.Embedding])
    opt,before = torch.optim.SGD(model.parameters(), lr=.1),snapshot(model)
    if functional or engine: model(torch.randint(50, (8, 4))).sum().backward()
    with pytest.raises(ValueError, match='`weight` of .*is a sparse tensor, and masks need a dense one: make the layer with `sparse=False`'):
        if engine: method_of('SET').step(model, opt, 1, total=10)
        else: attach(method_of('SET'), model, opt, 10); assert functional; opt.step()
    assert not changed(before, snapshot(model))

# ------------------------------------------------------------ resume: the count travels with the optimizer
def saved(*objects):
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)

@pytest.mark.parametrize('preset', ALL)
@pytest.mark.parametrize('cut', [17, 24, 30])
@pytest.mark.parametrize('opt_first', [False, True], ids=['model first', 'optimizer first'])
def test_resumed_from_state_dicts(preset, cut, opt_first):
    "Averages that had begun, explored weights and shared counts included, bit for bit, without a word about the step"
    def made():
        model = model_of(preset)
        opt = TORCH_OPTS['adamw'](model.parameters())
        return model, opt, attach(any_method(preset), model, opt, 40)
    def go(model, opt, data):
        for x,y in data: backward(model, x, y); opt.step()
    data,(model,opt,attached) = batches(40),made()
    go(model, opt, data[:cut])
    states = saved(model, opt)
    go(model, opt, data[cut:])
    twin,other,resumed = made()
    go(twin, other, data[:3])                                                                 # which is forgotten
    for o,s in sorted(zip((twin, other), states), key=lambda i: isinstance(i[0], nn.Module)==opt_first): o.load_state_dict(s)
    assert resumed.step==cut
    go(twin, other, data[cut:])
    assert resumed.step==40 and not changed(snapshot(model, opt), snapshot(twin, other))

def test_resumed_from_a_compact_file(tmp_path):
    "The count is in the file; an optimizer without a method takes the file too"
    def made():
        model = model_of('RigL')
        opt = TORCH_OPTS['adamw'](model.parameters())
        return model, opt, attach(any_method('RigL'), model, opt, 40)
    def go(model, opt, data):
        for x,y in data: backward(model, x, y); opt.step()
    data,(model,opt,_) = batches(40),made()
    go(model, opt, data[:17])
    path = save_sparse(model, tmp_path/'cut.safetensors', opt)
    go(model, opt, data[17:])
    twin,other,resumed = made()
    load_sparse(path, twin, other)
    assert resumed.step==17
    go(twin, other, data[17:])
    assert not changed(snapshot(model, opt), snapshot(twin, other))
    plain = model_of('RigL')
    bare = TORCH_OPTS['adamw'](plain.parameters())
    load_sparse(path, plain, bare)
    go(plain, bare, data[:1])

def test_a_state_without_the_count_still_loads():
    "An older file: the count stays as `attach` was told; what the optimizer knows of masked weights is forgotten"
    dense = mlp(8, 24, 20, 3)
    other = torch.optim.SGD(dense.parameters(), lr=.05, momentum=.9)
    plain_loop(dense, other, None, 5)
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    attached = attach(method_of('RigL'), model, opt, 40, step=3)
    opt.load_state_dict(other.state_dict())
    backward(model, *batches(1)[0])
    opt.step()
    assert attached.step==4 and masked_are_zero(model) and not dead_state(model, opt)
    attached.remove()
    assert 'sparsefast_step' not in opt.state_dict()['param_groups'][0]

def test_resumed_from_a_distributed_checkpoint():
    "torch's own keeps state and groups alone; loading takes an empty step to make the state, which is not to count"
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    def made():
        model = sparse_mlp()
        opt = TORCH_OPTS['adamw'](model.parameters())
        return model, opt, attach(method_of('RigL'), model, opt, 40)
    model,opt,attached = made()
    for x,y in batches(40)[:20]: backward(model, x, y); opt.step()
    states = copy.deepcopy(get_state_dict(model, opt))
    again,other,resumed = made()
    set_state_dict(again, other, model_state_dict=states[0], optim_state_dict=states[1])
    assert resumed.step==20 and 'sparsefast_step' not in other.param_groups[0]
    for net,o in ((model, opt), (again, other)):
        for x,y in batches(40)[20:]: backward(net, x, y); o.step()
    assert not changed(snapshot(model, opt), snapshot(again, other)) and not dead_state(again, other)

def test_a_step_that_fails_leaves_nothing_behind():
    "An update has taken the gradients away, and the optimizer raises: the next step is as if nothing had been"
    class Broken(torch.optim.SGD):
        broken = False
        def step(self, closure=None):
            if self.broken: raise RuntimeError('out of memory')
            super().step(closure)
    model = sparse_mlp()
    opt = Broken(model.parameters(), lr=.1)
    attached = attach(method_of('RigL', batches_per_update=1, stop_pct=.01), model, opt, 400)
    opt.broken = True
    backward(model, *batches(1)[0])
    with pytest.raises(RuntimeError, match='out of memory'): opt.step()
    opt.broken,attached.method = False,method_of('RigL', batches_per_update=100)
    backward(model, *batches(2)[1])
    grads = [p.grad for p in model.parameters()]
    opt.step()
    assert all(p.grad is g for p,g in zip(model.parameters(), grads)) and attached.step==2

# ------------------------------------------------------------ twice
def test_twice_is_refused():
    "A notebook's cell run again; after `remove` all is well"
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    attached,n = attach(method_of('SNFS', grow_score_f=random_score), model, opt, 40),len(opt._optimizer_step_pre_hooks)
    with pytest.raises(ValueError, match='opt must have one method.*step 0 of 40. already.*remove'): attach(method_of('SET'), model, opt, 40)
    assert len(opt._optimizer_step_pre_hooks)==n and attached_to(opt) is attached
    attached.remove()
    assert attached_to(opt) is None and attached_to(attach(method_of('SET'), model, opt, 40).opt)

def test_attached_and_stepped_by_hand_is_refused():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    attached,before = attach(method_of('SET'), model, opt, 40),snapshot(model)
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match='attached'): method_of('SET').step(model, opt, 1, total=40)
    assert attached.step==0 and not changed(before, snapshot(model))

def go(model, opt, n=1):
    for x,y in batches(n): backward(model, x, y); opt.step()

@pytest.mark.parametrize('preset', PRESETS)
def test_two_optimizers_attached_to_one_model_are_refused(preset):
    "The one that came first, as soon as it steps, before anything changes; after a `remove` all is well"
    model = sparse_mlp()
    first,second = (torch.optim.SGD(model.parameters(), lr=.05, momentum=.9) for _ in range(2))
    a = attach(method_of(preset), model, first, 40)
    go(model, first, 3)
    b,before = attach(method_of(preset), model, second, 40),snapshot(model, first)
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match=r"`weight` of .*must be rewired by one optimizer.*step 3 of 40.*step 0 of 40.*`remove\(\)`.*modules that it alone trains"): first.step()
    assert not changed(before, snapshot(model, first)) and a.step==3
    go(model, second, 20)                                                                # a second phase of a training needs no `remove`
    assert b.step==20 and masked_are_zero(model)
    b.remove()
    go(model, first)
    assert a.step==4

def test_two_optimizers_with_parts_of_one_model():
    "Each attached to its part: as two trainings. Each attached to the whole: refused"
    def parts(model): return model[:2],model[2:]
    def opts(model): return [torch.optim.SGD(part.parameters(), lr=.05, momentum=.9) for part in parts(model)]
    model = sparse_mlp()
    n,first,both = nnz(model),masks(model),opts(model)
    all_of_them = [attach(method_of('RigL'), part, opt, 40) for part,opt in zip(parts(model), both)]
    for x,y in batches(30):
        backward(model, x, y)
        for opt in both: opt.step()
        assert masked_are_zero(model)
    assert nnz(model)==n and not any(torch.equal(a, b) for a,b in zip(first, masks(model))) and [a.step for a in all_of_them]==[30, 30]
    model = sparse_mlp()
    both = opts(model)
    with pytest.warns(UserWarning, match='does not know'): kept = [attach(method_of('RigL'), model, opt, 40) for opt in both]
    backward(model, *batches(1)[0])
    with pytest.raises(ValueError, match='must be rewired by one optimizer'): both[0].step()

def test_an_attached_optimizer_that_is_gone_or_has_another_model_is_in_nobodys_way():
    model = sparse_mlp()
    opt,other = (torch.optim.SGD(model.parameters(), lr=.05) for _ in range(2))
    a = attach(method_of('SET'), model, opt, 40)
    attach(method_of('SET'), model, other, 40)
    twin = copy.deepcopy(model)
    b = attach(method_of('SET'), twin, third := torch.optim.SGD(twin.parameters(), lr=.05), 40)
    del other
    gc.collect()
    go(model, opt); go(twin, third); go(model, opt)
    assert (a.step, b.step)==(2, 1)

# ------------------------------------------------------------ a scaler and a fused optimizer
@pytest.mark.parametrize('preset', ['RigL', 'RigL_avg', 'SR_STE', 'SNFS'])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('by_hand', [False, True], ids=['', 'unscaled by hand'])
def test_a_scaler_changes_nothing(preset, fused, by_hand):
    "Averages and penalties read gradients as they are; an overflow is no step, and is not counted"
    model,twin = model_of(preset),model_of(preset)
    opt,other = (torch.optim.SGD(m.parameters(), lr=.05, momentum=.9, fused=fused) for m in (model, twin))
    attached,scaler,m = attach(any_method(preset), model, opt, 40),torch.amp.GradScaler('cpu', init_scale=2.**12, growth_interval=7),any_method(preset)
    for i,(x,y) in enumerate(batches(40)):
        opt.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)*(float('inf') if i in (9, 20) else 1.)).backward()
        if by_hand: scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        if i in (9, 20): continue
        backward(twin, x, y)
        m.step(twin, other, attached.step, total=40)
        assert not changed(snapshot(model, opt), snapshot(twin, other))
    assert attached.step==38 and scaler.get_scale()!=2.**12

@pytest.mark.parametrize('preset', ['RigL', 'RigL_avg', 'SR_STE', 'SNFS'])
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('by_hand', [False, True], ids=['', 'unscaled by hand'])
def test_a_step_that_knows_its_scaler(preset, fused, by_hand):
    "The run of the plain loop, bit for bit, and of `attach`; a step that overflows changes nothing but the scale, also the first and one with an update"
    model,twin,third = (model_of(preset) for _ in range(3))
    opt,other,last = (torch.optim.SGD(m.parameters(), lr=.05, momentum=.9, fused=fused) for m in (model, twin, third))
    make = partial(torch.amp.GradScaler, 'cpu', init_scale=2.**12, growth_interval=7)
    scaler,beside,m,step = make(),make(),any_method(preset),1
    attached,sched = attach(any_method(preset), third, last, 40),torch.optim.lr_scheduler.ConstantLR(opt, 1.)
    over = (0, 8, 9, 20)                                                                  # where each eighth step is an update, two of these are the eighth
    for i,(x,y) in enumerate(batches(40)):
        for net,o,s in ((model, opt, scaler), (third, last, beside)):
            o.zero_grad()
            s.scale(F.cross_entropy(net(x), y)*(float('inf') if i in over else 1.)).backward()
            if by_hand: s.unscale_(o)
        before,scale = snapshot(model, opt),scaler.get_scale()
        taken = m.step(model, opt, step, total=40, scaler=scaler)
        scaler.update()
        beside.step(last)
        beside.update()
        assert taken is (i not in over)
        if not taken:
            assert not changed(before, snapshot(model, opt)) and scaler.get_scale()==scale/2
            continue
        backward(twin, x, y)
        assert m.step(twin, other, step, total=40) is True
        assert not changed(snapshot(model, opt), snapshot(twin, other)) and not changed(snapshot(model), snapshot(third))        # torch's fused SGD by itself leaves its momentum uninitialized when its first step overflows
        sched.step()
        step += 1
    assert step==37 and attached.step==36 and all(p.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('scheduled', [False, True])
def test_a_step_with_a_scaler_leaves_the_optimizer_as_it_was(scheduled):
    class Broken(torch.optim.SGD):
        def step(self, closure=None): raise RuntimeError('out of memory')
    model,scaler = sparse_mlp(),torch.amp.GradScaler('cpu', init_scale=8.)
    opt = Broken(model.parameters(), lr=.1)
    if scheduled: torch.optim.lr_scheduler.ConstantLR(opt)
    was = dict(vars(opt))
    scaler.scale(F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1])).backward()
    with pytest.raises(RuntimeError, match='out of memory'): method_of('SET').step(model, opt, 1, total=40, scaler=scaler)
    assert ('step' in vars(opt))==scheduled and vars(opt).get('step') is was.get('step')
    off,opt = torch.amp.GradScaler('cpu', enabled=False),torch.optim.SGD(model.parameters(), lr=.1)
    assert method_of('SET').step(model, opt, 1, total=40, scaler=off) and masked_are_zero(model) and 'step' not in vars(opt)

def test_a_scaler_that_leaves_out_the_first_step_checks_before_it():
    model,scaler = sparse_mlp(),torch.amp.GradScaler('cpu')
    scaler.scale(F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1])*float('inf')).backward()
    with pytest.raises(ValueError, match='one history for all weights'): method_of('SET').step(model, torch.optim.LBFGS(model.parameters()), 1, total=40, scaler=scaler)

def test_beside_the_callback_is_refused():
    learn = learner(cbs=DynamicSparseTrainingCallback(**SET_presets))
    opt,before = torch.optim.SGD(learn.model.parameters(), lr=.1),snapshot(learn.model)
    with pytest.raises(ValueError, match='has a callback with one already'): attach(method_of('SET'), learn, opt, 1000)
    assert attached_to(opt) is None and not opt._optimizer_step_pre_hooks and not changed(before, snapshot(learn.model))
    learn.remove_cb(DynamicSparseTrainingCallback)
    assert attached_to(opt) is None and attached_to(attach(method_of('SET'), learn, opt, 1000).opt)

# ------------------------------------------------------------ torch.compile of the step
@pytest.mark.parametrize('preset', ['RigL', 'SET'])
def test_a_compiled_step(preset):
    "The optimizer's graphs alone (without momentum, with it, without gradients): the method works beside them, and nothing is compiled anew when masks change"
    import torch._dynamo as dynamo
    dynamo.reset(); dynamo.utils.counters.clear()
    model,twin = sparse_mlp(),sparse_mlp()
    opt,other = (torch.optim.SGD(m.parameters(), lr=.05, momentum=.9) for m in (model, twin))
    attached,m,step = attach(method_of(preset), model, opt, 40),method_of(preset),torch.compile(lambda: opt.step(), backend='eager')
    for i,(x,y) in enumerate(batches(40), 1):
        for net in (model, twin): backward(net, x, y)
        step()
        m.step(twin, other, i, total=40)
        assert not changed(snapshot(model, opt), snapshot(twin, other))
    assert attached.step==40 and 1<=dynamo.utils.counters['stats']['unique_graphs']<=3

def test_a_step_compiled_as_one_graph_is_refused():
    model = sparse_mlp()
    opt = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
    attached,before = attach(method_of('RigL'), model, opt, 40),snapshot(model, opt)
    backward(model, *batches(1)[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match='Attached._before'): torch.compile(lambda: opt.step(), backend='eager', fullgraph=True)()
    assert attached.step==0 and not changed(before, snapshot(model, opt))
