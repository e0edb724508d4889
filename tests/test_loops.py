"Callbacks in other people's trainers, models with masks from a folder, and methods as JSON"
import copy, json, subprocess, sys, types, warnings
from functools import partial
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from torch import nn
import sparsefast.presets as presets
from sparsefast.all import *
from sparsefast.methods import DSTMethod, load_method, save_method
from sparsefast.ship.hub import model_card, save_sparse_folder
from helpers import *

pytestmark = pytest.mark.filterwarnings('ignore')
HERE = Path(__file__).parents[1]
METHODS = {n.removesuffix('_presets'): p for n,p in vars(presets).items() if n.endswith('_presets')}
def method_of(preset='RigL', **kw): return DSTMethod(**{**METHODS[preset], 'batches_per_update': 8, **kw})

# ------------------------------------------------------------ methods as JSON
def through_json(d): return json.loads(json.dumps(d, allow_nan=False))

@pytest.mark.parametrize('preset', METHODS)
def test_every_preset_comes_back(preset):
    m = DSTMethod(**METHODS[preset])
    again = DSTMethod.from_dict(through_json(m.to_dict()))
    assert (again==m or any(hasattr(f, 'made_by') for f in vars(m).values())) and repr(again)==repr(m)
    assert again.to_dict()==through_json(m.to_dict()) and again.reads==m.reads

def test_only_functions_that_make_scores_are_called():
    settings = CHTs().to_dict()
    for bad in ('sparsefast.scores.random_score', 'sparsefast.scores.reads', 'os.system', 'sparsefast.scores._wrapped'):
        settings['keep_score_f']['maker'] = bad
        with pytest.raises(ValueError, match='keep_score_f must be'): DSTMethod.from_dict(settings)

def test_numbers_of_any_kind_and_partials_come_back(tmp_path):
    import numpy as np
    m = RigL(stop_pct=torch.tensor(.5), batches_per_update=np.int64(40), initial_drop_grow_pct=np.float32(.25), pattern_f=partial(block_pattern, size=(2, 2)), sparsity_span=(.1, .9))
    again = DSTMethod.from_dict(through_json(m.to_dict()))
    assert (again.stop_pct, again.batches_per_update, again.initial_drop_grow_pct, again.sparsity_span)==(.5, 40, .25, (.1, .9))
    assert again.pattern_f.func is block_pattern and again.pattern_f.keywords==dict(size=(2, 2)) and again.to_dict()==m.to_dict()
    assert save_method(m, tmp_path/'new').parent==tmp_path/'new' and load_method(tmp_path/'new').to_dict()==m.to_dict()

BAD = ['os.system', 'builtins.eval', 'builtins.exec', 'subprocess.run', 'sparsefast.scores.__getattr__', 'sparsefast.scores.torch', 'sparsefast.scores.torch.load', 'sparsefast.scores.inner_opt', 'sparsefast.scores._no_such',
       'sparsefast.scores.no_such', 'sparsefast.optim.StateView', 'sparsefast.optim.inspect', 'sparsefast.saliency._look_up', 'sparsefast.checkpoint.atomic_save', 'sparsefast.utils.atomic_write', 'sparsefast.cli.train.sparsefast_train', 'sparsefast', 'scores.weight_magnitude',
       '', '.', 'torch.load', '..scores.weight_magnitude', 'weight_magnitude', 'sparsefast.scores.weight_magnitude.__call__', 3, None, ['sparsefast.scores.weight_magnitude']]
@pytest.mark.parametrize('name', BAD)
@pytest.mark.parametrize('allow', [(), ['json']])
def test_what_a_file_may_not_name_is_refused(name, allow):
    with pytest.raises(ValueError, match='keep_score_f must be a (public )?function'): DSTMethod.from_dict(dict(keep_score_f=dict(function=name)), allow)
    nested = dict(function='sparsefast.patterns.nm_pattern', options=dict(m=dict(function=name)))
    with pytest.raises(ValueError, match='pattern_f must be a (public )?function'): DSTMethod.from_dict(dict(pattern_f=nested), allow)

@pytest.mark.parametrize('v', [dict(), dict(f='x'), dict(function='sparsefast.scores.weight_magnitude', code='x'), dict(function='sparsefast.scores.weight_magnitude', args='xy'), dict(function='sparsefast.scores.weight_magnitude', options=[1]), 'sparsefast.scores.weight_magnitude', 7, [1]])
def test_a_function_in_another_form_is_refused(v):
    with pytest.raises((ValueError, TypeError), match='keep_score_f must be'): DSTMethod.from_dict(dict(keep_score_f=v))

@pytest.mark.parametrize('d', [dict(__class__='x'), dict(stop_pct=3), dict(no_such=1), dict(batches_per_update='1')])
def test_settings_are_checked_as_ever(d):
    with pytest.raises((ValueError, TypeError), match=next(iter(d))): DSTMethod.from_dict(d)

@pytest.mark.parametrize('d', [None, [], 'rigl', 3])
def test_what_is_no_dict_is_refused(d):
    with pytest.raises(TypeError, match='settings must be a dict'): DSTMethod.from_dict(d)

def test_nothing_is_imported_but_what_is_allowed(tmp_path, monkeypatch):
    (tmp_path/'seen_by_nobody.py').write_text("raise SystemExit('imported')\n")
    (tmp_path/'a_users_scores.py').write_text("from subprocess import run\nimport os\ndef mine(p, **kw): return p.abs()\nclass Mine: pass\nalso = lambda p, **kw: p\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match='allow'): DSTMethod.from_dict(dict(keep_score_f=dict(function='seen_by_nobody.f')))
    import a_users_scores
    for allow in (['a_users_scores'], [a_users_scores]):
        m = DSTMethod.from_dict(dict(keep_score_f=dict(function='a_users_scores.mine')), allow)
        assert m.keep_score_f is a_users_scores.mine and m.to_dict()['keep_score_f']==dict(function='a_users_scores.mine')
    for n in ('run', 'os', 'Mine', 'os.system', '__builtins__'):
        with pytest.raises(ValueError): DSTMethod.from_dict(dict(keep_score_f=dict(function=f'a_users_scores.{n}')), ['a_users_scores'])

class Scores:
    def __call__(self, p, **kw): return p.abs()
    def bound(self, p, **kw): return p.abs()
def _hidden(p, **kw): return p.abs()
@pytest.mark.parametrize('f', [lambda p, **kw: p.abs(), Scores(), Scores().bound, torch.abs, Scores, _hidden, partial(lambda p, **kw: p), (lambda: (lambda p, **kw: p))()],
                         ids=['lambda', 'object', 'bound', 'builtin', 'class', 'hidden', 'partial', 'inner'])
def test_what_has_no_name_is_not_written(f):
    with pytest.raises(ValueError, match='keep_score_f must be a public function of a module to be written'): RigL(keep_score_f=f).to_dict()

# ------------------------------------------------------------ Hugging Face
X = torch.cat([x for x,_ in batches(10)])
Y = torch.cat([y for _,y in batches(10)])
DS = [dict(x=x, labels=y) for x,y in zip(X, Y)]

class Net(nn.Module):
    def __init__(self, dense=True, sparsity=.6):
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp(8, 24, 20, 3)
        if not dense: sparsify_model(self, sparsity)
    def forward(self, x, labels):
        out = self.net(x)
        return dict(loss=F.cross_entropy(out, labels), logits=out)

@pytest.fixture
def hf():
    pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    import transformers, sparsefast.loops.hf as hf
    hf.T = transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return hf

def trainer_of(hf, out, *cbs, model=None, steps=40, accumulate=1, clip=0, ds=DS, model_init=None, saves=False, **kw):
    class Ordered(hf.T.Trainer):
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(ds)
    args = hf.T.TrainingArguments(str(out), max_steps=steps, per_device_train_batch_size=8, report_to='none', use_cpu=True, disable_tqdm=True, save_strategy='steps' if saves else 'no', save_steps=16, logging_steps=4, learning_rate=1e-2, weight_decay=.1,
                                  max_grad_norm=clip, gradient_accumulation_steps=accumulate, lr_scheduler_type='constant', **kw)
    trainer = Ordered(model, args, train_dataset=ds, callbacks=list(cbs), model_init=model_init)
    trainer.remove_callback(hf.T.trainer_callback.PrinterCallback)
    return trainer

@pytest.mark.parametrize('preset,accumulate,clip', [('RigL', 1, 0), ('SET', 2, 0), ('SNFS', 1, 0), ('RigL_avg', 2, 0), ('TopKAST', 2, 0), ('GMP', 1, 0), ('RigL', 2, .5)])
def test_trainer_equals_the_plain_loop(hf, tmp_path, preset, accumulate, clip):
    "Bit for bit, with the masks that the callback makes; gradients are clipped as `attach` has it, before the method sees them"
    m,seen = method_of(preset),[]
    class Look(hf.T.TrainerCallback):
        def on_step_end(self, *args, model=None, **kw): seen.append(snapshot(model)); assert preset=='TopKAST' or masked_are_zero(model)
    cb = hf.SparseTrainerCallback(m, sparsity=.6)
    trainer = trainer_of(hf, tmp_path, cb, Look(), model=Net(), accumulate=accumulate, clip=clip)
    twin = copy.deepcopy(trainer.model)
    enforce_masks(twin)
    trainer.train()
    opt = trainer_of(hf, tmp_path, model=twin).create_optimizer()
    attached = attach(m, twin, opt, 40) if clip else None
    data = batches(10)*8
    for step in range(1, 41):
        for x,y in data[(step-1)*accumulate:step*accumulate]: (twin(x, y)['loss']/accumulate).backward()
        if clip: nn.utils.clip_grad_norm_(twin.parameters(), clip); opt.step()
        else: m.step(twin, opt, step, total=40)
        twin.zero_grad()
        assert not changed(seen[step-1], snapshot(twin))
    assert not changed(snapshot(trainer.model, trainer.optimizer.optimizer), snapshot(twin, opt)) and not same_masks(masks(twin), masks(Net(dense=False)))
    assert cb.attached.step==40 and not opt_hooks(trainer.optimizer.optimizer)

def opt_hooks(opt): return [h for h in opt._optimizer_step_pre_hooks.values() if hasattr(getattr(h, '__self__', None), 'method')]

@pytest.mark.parametrize('preset', ['RigL', 'RigL_avg', 'TopKAST'])
def test_trainer_resumes(hf, tmp_path, preset):
    "With new objects, and other random masks that the checkpoint's replace"
    def run(seed, **kw):
        torch.manual_seed(seed)
        trainer = trainer_of(hf, tmp_path, cb := hf.SparseTrainerCallback(method_of(preset), sparsity=.6), model=Net(), saves=True)
        trainer.train(**kw)
        return trainer,cb
    (first,cb),(again,other) = run(0),run(1, resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    assert other.attached.step==cb.attached.step==40
    assert not changed(snapshot(first.model, first.optimizer.optimizer), snapshot(again.model, again.optimizer.optimizer))
    assert load_method(tmp_path/'checkpoint-16')==load_method(tmp_path)==method_of(preset)

def test_trainer_warns_of_another_method(hf, tmp_path):
    def run(m, **kw):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            trainer_of(hf, tmp_path, hf.SparseTrainerCallback(m, sparsity=.6), model=Net(), steps=20, saves=True).train(**kw)
        return [str(w.message) for w in found if 'checkpoint' in str(w.message)]
    assert not run(method_of())
    assert not run(method_of(), resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    msg, = run(method_of(stop_pct=.9), resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    assert 'other stop_pct' in msg
    assert len(run(method_of(keep_score_f=lambda p, **kw: p.abs())))==1                       # once, when it is made

def test_trainer_log_has_columns(hf, tmp_path):
    seen = []
    class Reporter(hf.T.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kw): seen.append(dict(logs))
    trainer = trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of(), sparsity=.6), Reporter(), model=Net())
    first = masks(trainer.model)
    trainer.train()
    n = n_params(trainer.model)
    for logs in (seen, trainer.state.log_history):
        rows = [l for l in logs if 'loss' in l]
        assert len(rows)==10 and all(abs(l['sparsity']-(1-sum(nnz(trainer.model))/n))<1e-9 for l in rows)
        assert rows[0]['churn']==0 and 0<rows[1]['churn']<=.3 and rows[1]['churn']==rows[2]['churn']!=rows[3]['churn']
        assert not any('churn' in l for l in logs if 'loss' not in l)

def test_churn_is_the_share_of_active_weights_replaced(hf, tmp_path):
    model = Net(dense=False)
    before = masks(model)
    trainer = trainer_of(hf, tmp_path, cb := hf.SparseTrainerCallback(method_of('SET')), model=model, steps=12)
    trainer.train()
    gone = sum(int((a & ~b).sum()) for a,b in zip(before, masks(model)))
    assert cb.now['churn']==gone/sum(int(a.sum()) for a in before)>0

def test_trainer_twice_and_in_epochs(hf, tmp_path):
    "The same trainer again, and a method that updates once an epoch"
    trainer = trainer_of(hf, tmp_path, cb := hf.SparseTrainerCallback(SET(update_every=None)), model=Net(dense=False), steps=30, accumulate=2)
    for _ in range(2):
        before = masks(trainer.model)
        trainer.train()
        assert cb.attached.step==30 and cb.attached.method.batches_per_update==5 and not same_masks(before, masks(trainer.model)) and masked_are_zero(trainer.model)

def test_model_init(hf, tmp_path):
    cb = hf.SparseTrainerCallback(method_of(), sparsity=.6)
    trainer = trainer_of(hf, tmp_path, cb, model_init=lambda: Net(), saves=True)
    trainer.train()
    assert abs(cb.now['sparsity']-.6)<.01 and masked_are_zero(trainer.model)
    with pytest.raises(ValueError, match='found no place in a dense model.*`model_init`, and leave `sparsity` out'):
        trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of(), sparsity=.6), model_init=lambda: Net()).train(resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    again = trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of()), model_init=lambda: Net(dense=False))
    again.train(resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    assert not changed(snapshot(trainer.model), snapshot(again.model))

@pytest.mark.parametrize('restore', [False, True])
def test_trainer_restores_the_callback_itself(hf, tmp_path, restore):
    "`restore_callback_states_from_checkpoint` makes callbacks anew from the trainer's state"
    trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of(), sparsity=.6), model=Net(), saves=True).train()
    trainer = trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of(), sparsity=.6), model=Net(), restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    cb, = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, hf.SparseTrainerCallback)]
    assert cb.attached.step==40 and cb.method==method_of()

def test_trainer_scaler_leaves_a_step_out(hf, tmp_path):
    "As with mixed precision on a GPU: an overflow, here of the sixth loss, is no step of the method"
    class Overflows(Net):
        n = 0
        def forward(self, x, labels):
            self.n += 1
            out = super().forward(x, labels)
            return dict(out, loss=out['loss']*(float('inf') if self.n==6 else 1.))
    trainer = trainer_of(hf, tmp_path, cb := hf.SparseTrainerCallback(method_of(), sparsity=.6), model=Overflows(), saves=True)
    trainer.accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    trainer.train()
    assert cb.attached.step==39 and trainer.state.global_step==40 and masked_are_zero(trainer.model) and abs(cb.now['sparsity']-.6)<.01
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    (tmp_path/'checkpoint-16/scaler.pt').unlink()
    again = trainer_of(hf, tmp_path, other := hf.SparseTrainerCallback(method_of(), sparsity=.6), model=Net())
    again.train(resume_from_checkpoint=str(tmp_path/'checkpoint-16'))
    assert other.attached.step==15+24                                                         # of the count in the optimizer's state, not the trainer's

def test_trainer_bf16(hf, tmp_path):
    trainer = trainer_of(hf, tmp_path, cb := hf.SparseTrainerCallback(method_of(), sparsity=.6), model=Net(), bf16=True, clip=1.)
    trainer.train()
    assert cb.attached.step==40 and masked_are_zero(trainer.model) and abs(cb.now['sparsity']-.6)<.01

def test_trainer_wrong_use(hf, tmp_path, monkeypatch):
    cb,make = hf.SparseTrainerCallback,partial(trainer_of, hf, tmp_path, steps=20)
    with pytest.raises(TypeError, match='method must be a DSTMethod'): cb(None)
    with pytest.raises(ValueError, match='choose from|did you mean'): cb('rigll')
    with pytest.raises(ValueError, match='sparse_f must be given with sparsity'): cb('rigl', sparse_f='erk')
    with pytest.raises(ValueError, match='must have a mask to train with.*sparsify_model'): make(cb(method_of()), model=Net()).train()
    with pytest.raises(ValueError, match='sparsity must be left out for a model with masks'): make(cb(method_of(), sparsity=.5), model=Net(dense=False))
    with pytest.raises(ValueError, match='model_sparsity must be a number from 0 to 1'): make(cb(method_of(), sparsity=90), model=Net())
    with pytest.raises(ValueError, match='must have one method, and has Attached.*give one callback'): make(cb(method_of()), cb(method_of('SET')), model=Net(dense=False)).train()
    for opt in (torch.optim.LBFGS, type('AdamW8bit', (torch.optim.AdamW,), {})):
        model = Net(dense=False)
        trainer = make(cb(method_of()), model=model)
        trainer.optimizer,before = opt(model.parameters()),snapshot(model)
        with pytest.raises(ValueError, match=opt.__name__): trainer.train()
        assert not changed(before, snapshot(model))
    for name in ('FSDP', 'DEEPSPEED'):
        args = make(model=Net()).args
        monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'true')
        with pytest.raises(ValueError, match='needs whole parameters, and (FSDP|DeepSpeed) splits them'): cb(method_of()).on_init_end(args, None, None, model=Net())
        monkeypatch.delenv(f'ACCELERATE_USE_{name}')
    args.fsdp = True
    with pytest.raises(ValueError, match='FSDP splits'): cb(method_of()).on_init_end(args, None, None, model=Net())

def bert(hf, cls='BertForSequenceClassification', **kw):
    torch.manual_seed(0)
    config = hf.T.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=12, **kw)
    return getattr(hf.T, cls)(config)

# ------------------------------------------------------------ models with masks from a folder
@pytest.mark.parametrize('how', ['save_pretrained', 'shards', 'folder'])
@pytest.mark.parametrize('cls', ['BertForSequenceClassification', 'AutoModelForSequenceClassification'])
def test_pretrained_keeps_masks(hf, tmp_path, how, cls):
    dtype = torch.float32 if cls.startswith('Auto') else torch.bfloat16
    model = bert(hf, num_labels=3).to(dtype)
    sparsify_model(model, .8, keep='magnitude')
    if how=='folder': save_sparse_folder(model, tmp_path, RigL())
    else: model.save_pretrained(tmp_path, **dict(max_shard_size='8KB') if how=='shards' else {})
    assert (tmp_path/'model.safetensors.index.json').exists()==(how=='shards')
    again = hf.load_sparse_pretrained(getattr(hf.T, cls), str(tmp_path))
    assert type(again) is type(model) and not again.training and not changed(snapshot(model), snapshot(again)) and [t for *_,t in sparse_params(again)]==[t for *_,t in sparse_params(model)]
    with torch.no_grad(): sparse_params(again)[0][0].add_(1.)
    again(torch.randint(30, (2, 5)))
    assert masked_are_zero(again)                                                             # by hooks

def test_from_pretrained_alone_is_dense_with_zeros(hf, tmp_path):
    "What the docs say of it"
    model = bert(hf)
    sparsify_model(model, .8, keep='magnitude')
    model.save_pretrained(tmp_path)
    dense = hf.T.BertForSequenceClassification.from_pretrained(tmp_path)
    assert not masks(dense) and all(torch.equal(p, q) for p,q in zip(model.parameters(), dense.parameters()))

def test_the_body_of_a_model_and_a_new_head(hf, tmp_path):
    model = bert(hf)
    sparsify_model(model, .8, keep='magnitude')
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match='BertModel has no weights for the masks of classifier.weight'): body = hf.load_sparse_pretrained(hf.T.BertModel, tmp_path)
    assert len(masks(body))==len(masks(model))-1 and not changed(snapshot(model.bert), snapshot(body))
    body.save_pretrained(tmp_path/'body')
    with pytest.warns(UserWarning, match='are new.*classifier.weight'): back = hf.load_sparse_pretrained(hf.T.BertForSequenceClassification, tmp_path/'body')
    assert not changed(snapshot(model.bert), snapshot(back.bert)) and len(masks(back))==len(masks(body))

def test_tied_weights_and_a_class_that_makes_masks(hf, tmp_path):
    torch.manual_seed(0)
    config = hf.T.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    class Sparse(hf.T.GPT2LMHeadModel):
        def __init__(self, config): super().__init__(config); sparsify_model(self, .8)
    model = hf.T.GPT2LMHeadModel(config)
    sparsify_model(model, .8)
    for i,save in enumerate((model.save_pretrained, partial(save_sparse_folder, model))):
        save(tmp_path/str(i))
        again = hf.load_sparse_pretrained(hf.T.AutoModelForCausalLM, tmp_path/str(i))
        assert not changed(snapshot(model), snapshot(again)) and again.lm_head.weight is again.transformer.wte.weight
    assert not changed(snapshot(model), snapshot(hf.load_sparse_pretrained(Sparse, tmp_path/'0')))

def test_pretrained_wrong_use(hf, tmp_path):
    bert(hf).save_pretrained(tmp_path/'dense')
    with pytest.raises(ValueError, match="must have masks, got a dense model.*keep='magnitude'"): hf.load_sparse_pretrained(hf.T.BertForSequenceClassification, str(tmp_path/'dense'))
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='must have `sparse.safetensors` or `model.safetensors`'): hf.load_sparse_pretrained(hf.T.BertForSequenceClassification, str(tmp_path/'empty'))

def test_a_trainers_checkpoint_is_a_folder_like_any(hf, tmp_path):
    model = bert(hf)
    ds = [dict(input_ids=torch.randint(30, (6,)), labels=i%2) for i in range(16)]
    trainer = trainer_of(hf, tmp_path, hf.SparseTrainerCallback(method_of(), sparsity=.8, keep='random'), model=model, ds=ds, steps=16, saves=True)
    trainer.train()
    again = hf.load_sparse_pretrained(hf.T.BertForSequenceClassification, tmp_path/'checkpoint-16')
    assert not changed(snapshot(model), snapshot(again))
    more = trainer_of(hf, tmp_path/'more', cb := hf.SparseTrainerCallback(load_method(tmp_path/'checkpoint-16')), model=again, ds=ds, steps=16)
    more.train()
    assert cb.attached.step==16 and not same_masks(masks(model), masks(again)) and nnz(model)==nnz(again)

# ------------------------------------------------------------ a folder to share, and the hub
def test_folder(tmp_path):
    model = sparse_mlp()
    folder = save_sparse_folder(model, tmp_path/'a', 'rigl', ['mnist', 'my: "data"\n---\n# x | y'], title='A title', license='mit')
    assert sorted(f.name for f in folder.iterdir())==['README.md', 'sparse.safetensors', 'sparse_method.json'] and load_method(folder)==RigL()
    for where in (folder, str(folder), folder/'sparse.safetensors'): assert not changed(snapshot(model), snapshot(load_sparse(where, mlp(8, 24, 20, 3))))
    head = pytest.importorskip('yaml').safe_load((folder/'README.md').read_text().split('---\n')[1])
    assert head['license']=='mit' and head['datasets']==['mnist'] and head['sparsefast']['data']==['mnist', 'my: "data"\n---\n# x | y'] and head['library_name']=='sparsefast' and 'sparse' in head['tags']
    assert head['sparsefast']['method'].startswith('RigL') and abs(head['sparsefast']['sparsity']-.6)<.01 and head['sparsefast']['versions'].keys()=={'sparsefast', 'torch'}
    save_sparse_folder(sparse_mlp(.9), folder, 'set')                                          # our own card is replaced
    assert 'SET' in (folder/'README.md').read_text() and 'license' not in (folder/'README.md').read_text()
    (folder/'README.md').write_text('# Mine\n')
    with pytest.warns(UserWarning, match='README.md stays'): save_sparse_folder(model, folder)
    assert (folder/'README.md').read_text()=='# Mine\n'

def test_the_hubs_own_reader_reads_the_card(hf, tmp_path):
    hub = pytest.importorskip('huggingface_hub')
    model = bert(hf)
    sparsify_model(model, .8, keep='magnitude')
    save_sparse_folder(model, tmp_path, RigL(update_every=50), 'imdb', language='en')
    card = hub.ModelCard.load(tmp_path/'README.md')
    assert card.data.library_name=='transformers' and card.data.datasets==['imdb'] and card.data.to_dict()['sparsefast']['sparsity']==pytest.approx(.8, abs=1e-3)
    assert 'load_sparse_pretrained(BertForSequenceClassification' in card.text and json.loads((tmp_path/'config.json').read_text())['architectures']==['BertForSequenceClassification']

def test_load_sparse_by_a_hubs_name(tmp_path, monkeypatch):
    hub,model = pytest.importorskip('huggingface_hub'),sparse_mlp()
    save_sparse_folder(model, tmp_path/'there')
    asked = []
    def download(repo, name): asked.append((repo, name)); return str(tmp_path/'there'/name)
    monkeypatch.setattr(hub, 'hf_hub_download', download)
    monkeypatch.chdir(tmp_path)
    assert not changed(snapshot(model), snapshot(load_sparse('owner/some-model_1.0', mlp(8, 24, 20, 3)))) and asked==[('owner/some-model_1.0', 'sparse.safetensors')]
    for name in (Path('owner/name'), 'owner/name/more', '/owner/name', './name', '../name', 'name', 'owner/name.safetensors', tmp_path/'no'):
        with pytest.raises(FileNotFoundError): load_sparse(name)
    assert len(asked)==1                                                                     # none of these is a hub's
    save_sparse_folder(sparse_mlp(.9), tmp_path/'owner/name')
    assert nnz(load_sparse('owner/name', mlp(8, 24, 20, 3)))==nnz(sparse_mlp(.9)) and len(asked)==1
    def offline(repo, name): raise hub.errors.LocalEntryNotFoundError('no network')
    monkeypatch.setattr(hub, 'hf_hub_download', offline)
    with pytest.raises(FileNotFoundError, match="'owner/other' is no file or folder here, and cannot be fetched from the hub: no network"): load_sparse('owner/other')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(FileNotFoundError, match='cannot be fetched from the hub'): load_sparse('owner/other')

def test_load_sparse_pretrained_by_a_hubs_name(hf, tmp_path, monkeypatch):
    model = bert(hf)
    sparsify_model(model, .8, keep='magnitude')
    save_sparse_folder(model, tmp_path/'there')
    monkeypatch.setattr(hf, 'cached_file', lambda name, file, **kw: str(tmp_path/'there'/file))
    config = hf.AutoConfig.from_pretrained(tmp_path/'there')
    monkeypatch.setattr(hf.AutoConfig, 'from_pretrained', lambda name, **kw: config)
    assert not changed(snapshot(model), snapshot(hf.load_sparse_pretrained(hf.T.BertForSequenceClassification, 'owner/name')))

# ------------------------------------------------------------ Lightning
@pytest.fixture
def pl():
    L = pytest.importorskip('lightning')
    import sparsefast.loops.lightning as pl
    pl.L = L
    class Lit(L.LightningModule):
        def __init__(self, dense=True, opt=partial(torch.optim.AdamW, lr=1e-2, weight_decay=.1)):
            super().__init__()
            torch.manual_seed(0)
            self.net,self.opt,self.seen = mlp(8, 24, 20, 3),opt,[]
            if not dense: sparsify_model(self, .6)
        def configure_optimizers(self): return self.opt(self.parameters())
        def training_step(self, batch, i): return F.cross_entropy(self.net(batch[0]), batch[1])
        def validation_step(self, batch, i): self.log('loss', F.cross_entropy(self.net(batch[0]), batch[1]))
        test_step = validation_step
        def on_train_batch_end(self, *args): self.seen.append(snapshot(self, self.optimizers().optimizer))
    pl.Lit = Lit
    return pl

def lit_trainer(pl, out, *cbs, **kw):
    kw = dict(max_epochs=4, accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=any('Checkpoint' in type(cb).__name__ for cb in cbs)) | kw
    return pl.L.Trainer(callbacks=list(cbs), default_root_dir=out, **kw)

def loader(): return torch.utils.data.DataLoader(TensorDataset(X, Y), batch_size=8)

@pytest.mark.parametrize('preset,accumulate,clip', [('RigL', 1, None), ('SET', 2, None), ('SNFS', 1, None), ('RigL_avg', 2, None), ('TopKAST', 2, None), ('GMP', 1, None), ('RigL', 2, .5)])
def test_lightning_equals_the_plain_loop(pl, tmp_path, preset, accumulate, clip):
    m,module,n = method_of(preset, batches_per_update=5),pl.Lit(),40//accumulate
    twin = copy.deepcopy(module)
    trainer = lit_trainer(pl, tmp_path, cb := pl.SparseCallback(m, sparsity=.6), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    torch.manual_seed(7)
    trainer.fit(module, loader())
    torch.manual_seed(7)
    sparsify_model(twin, .6, **m.sparsify_kwargs(.6))
    opt = twin.configure_optimizers()
    if clip: attach(m, twin, opt, n)
    for i,(x,y) in enumerate(batches(10)*4, 1):
        (F.cross_entropy(twin.net(x), y)/accumulate).backward()
        if i%accumulate: continue
        if clip: nn.utils.clip_grad_norm_(twin.parameters(), clip); opt.step()
        else: m.step(twin, opt, i//accumulate, total=n)
        opt.zero_grad()
        assert not changed(module.seen[i-1], snapshot(twin, opt))
    assert cb.attached.step==cb.attached.total==n and not opt_hooks(trainer.optimizers[0]) and not same_masks(masks(twin), masks(pl.Lit(dense=False)))

@pytest.mark.parametrize('preset', ['RigL', 'RigL_avg', 'TopKAST'])
def test_lightning_resumes(pl, tmp_path, preset):
    def fit(seed, **kw):
        keep = pl.L.pytorch.callbacks.ModelCheckpoint(tmp_path, '{epoch}', save_top_k=-1)
        trainer = lit_trainer(pl, tmp_path, keep, cb := pl.SparseCallback(method_of(preset, batches_per_update=6), sparsity=.6))
        module = pl.Lit()
        torch.manual_seed(seed)
        trainer.fit(module, loader(), **kw)
        return module,cb
    (module,cb),(again,other) = fit(0),fit(1, ckpt_path=str(tmp_path/'epoch=1.ckpt'))
    assert len(again.seen)==20 and other.attached.step==40 and not changed(module.seen[-1], again.seen[-1])
    state = torch.load(tmp_path/'epoch=1.ckpt', weights_only=True)                            # plain values only
    assert DSTMethod.from_dict(state['callbacks']['SparseCallback']['method'])==method_of(preset, batches_per_update=6)
    with pytest.warns(UserWarning, match='other stop_pct'):
        lit_trainer(pl, tmp_path, pl.SparseCallback(method_of(preset, batches_per_update=6, stop_pct=.9), sparsity=.6)).fit(pl.Lit(), loader(), ckpt_path=str(tmp_path/'epoch=1.ckpt'))
    fresh = pl.Lit()
    lit_trainer(pl, tmp_path, pl.SparseCallback('rigl', sparsity=.6)).test(fresh, loader(), ckpt_path=str(tmp_path/'epoch=3.ckpt'), verbose=False)
    assert not changed({k: v for k,v in module.seen[-1].items() if 'model' in k}, snapshot(fresh))

def test_lightning_logs(pl, tmp_path):
    from lightning.pytorch.loggers import CSVLogger
    trainer = lit_trainer(pl, tmp_path, cb := pl.SparseCallback(method_of(batches_per_update=5), sparsity=.6), logger=CSVLogger(tmp_path), log_every_n_steps=5)
    trainer.fit(pl.Lit(), loader())
    header,*rows = [l.split(',') for l in next(tmp_path.rglob('metrics.csv')).read_text().splitlines()]
    rows = [dict(zip(header, r)) for r in rows]
    assert {'sparsity', 'churn'}<=set(header) and len(rows)==8 and all(abs(float(r['sparsity'])-.6)<.01 for r in rows) and 0<float(rows[0]['churn'])<=.3
    assert trainer.callback_metrics['churn']==pytest.approx(cb.now['churn']) and trainer.callback_metrics['sparsity']==pytest.approx(cb.now['sparsity'])

def test_lightning_twice_and_in_epochs(pl, tmp_path):
    cb,module = pl.SparseCallback(SET(update_every=None), sparsity=.6),pl.Lit()
    for _ in range(2):
        trainer,before = lit_trainer(pl, tmp_path, cb, accumulate_grad_batches=2),masks(module)
        trainer.fit(module, loader())
        assert cb.attached.step==20 and cb.attached.method.batches_per_update==5 and not same_masks(before, masks(module)) and masked_are_zero(module)

def test_lightning_scaler_and_bf16(pl, tmp_path):
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**127, growth_interval=1000)
    for kw in (dict(plugins=pl.L.pytorch.plugins.MixedPrecision('16-mixed', 'cpu', scaler)), dict(precision='bf16-mixed', gradient_clip_val=1.)):
        module,cb = pl.Lit(),pl.SparseCallback(method_of(), sparsity=.6)
        lit_trainer(pl, tmp_path, cb, **kw).fit(module, loader())
        assert masked_are_zero(module) and abs(cb.now['sparsity']-.6)<.01 and (cb.attached.step==40)==('precision' in kw) and all(p.isfinite().all() for p in module.parameters())

def test_lightning_manual_optimization(pl, tmp_path):
    class Manual(pl.Lit):
        automatic_optimization = False
        def training_step(self, batch, i):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(super().training_step(batch, i))
            opt.step()
    module = Manual()
    lit_trainer(pl, tmp_path, cb := pl.SparseCallback(method_of(), sparsity=.6)).fit(module, loader())
    assert cb.attached.step==40 and masked_are_zero(module)

def test_lightning_wrong_use(pl, tmp_path):
    cb,fit = pl.SparseCallback,lambda module, *cbs, **kw: lit_trainer(pl, tmp_path, *cbs, **kw).fit(module, loader())
    with pytest.raises(TypeError, match='method must be a DSTMethod'): cb(None)
    with pytest.raises(ValueError, match='exclude must be given with sparsity'): cb('rigl', exclude=['0'])
    with pytest.raises(ValueError, match='must have a mask to train with'): fit(pl.Lit(), cb(method_of()))
    with pytest.raises(ValueError, match='sparsity must be left out for a model with masks'): fit(pl.Lit(dense=False), cb(method_of(), sparsity=.5))
    with pytest.raises(RuntimeError, match='SparseCallback'): fit(pl.Lit(), cb(method_of()), cb(method_of(), sparsity=.6))      # Lightning's own
    with pytest.raises(ValueError, match='how long it trains, got inf steps'): fit(pl.Lit(), cb(method_of(), sparsity=.6), max_epochs=-1)
    for opt in (torch.optim.LBFGS, type('AdamW8bit', (torch.optim.AdamW,), {})):
        with pytest.raises(ValueError, match=opt.__name__): fit(pl.Lit(opt=opt), cb(method_of(), sparsity=.6))
    class Two(pl.Lit):
        automatic_optimization = False
        def configure_optimizers(self): return [torch.optim.SGD(self.parameters(), lr=.1) for _ in range(2)]
    with pytest.raises(ValueError, match='must have one optimizer, got 2: call `attach` for each'): fit(Two(), cb(method_of(), sparsity=.6))
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
    for s in (FSDPStrategy, DeepSpeedStrategy):
        trainer = types.SimpleNamespace(strategy=object.__new__(s), callbacks=[])
        with pytest.raises(ValueError, match=f'needs whole parameters, and {s.__name__} splits them'): cb(method_of()).setup(trainer, pl.Lit(), 'fit')

# ------------------------------------------------------------ timm's script
@pytest.mark.parametrize('method,average', [(RigL(update_every=4), True), (RigL_avg(update_every=4), False)], ids=['average', 'sums'])
def test_timm(method, average, tmp_path):
    "Its scaler, clipping, accumulation, average, schedule, checkpoints and resume between two updates, in the order of its training script"
    timm = pytest.importorskip('timm')
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.models import model_parameters
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
    x,y = torch.randn(48, 3, 32, 32),torch.arange(48)%2
    def run(seed, start=0):
        torch.manual_seed(seed)
        model = timm.create_model('resnet10t', num_classes=2)
        sparsify_model(model, .9, sparse_f='erk')
        optimizer,scaler = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=.05),NativeScaler('cpu')
        if start: assert resume_checkpoint(model, str(tmp_path/'checkpoint-1.pth.tar'), optimizer=optimizer, loss_scaler=scaler)==start
        ema = ModelEmaV3(model, decay=.9, use_warmup=True) if average else None
        updates_per_epoch = 3
        lr_scheduler,num_epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=4, cooldown_epochs=0, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=updates_per_epoch)
        if start: lr_scheduler.step_update(start*updates_per_epoch)
        attached = attach(method, model, optimizer, total=num_epochs*updates_per_epoch)
        saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
        first,num_updates = masks(model),start*updates_per_epoch
        for epoch in range(start, num_epochs):
            model.train()
            for i,(xb,yb) in enumerate(zip(x.split(8), y.split(8))):
                scaler(F.cross_entropy(model(xb), yb)/2, optimizer, clip_grad=1., parameters=model_parameters(model), need_update=i%2==1)
                if i%2==0: continue
                num_updates += 1
                optimizer.zero_grad()
                if ema: ema.update(model, step=num_updates)
                assert masked_are_zero(model)
                lr_scheduler.step_update(num_updates=num_updates)
            for m in (model, ema.module) if ema else (model,):
                assert m.eval()(x[:2]).isfinite().all() and same_masks(masks(m), masks(model)) and masked_are_zero(m)
            lr_scheduler.step(epoch+1)
            if not start: saver.save_checkpoint(epoch)
        assert attached.step==12 and not same_masks(first, masks(model))
        return model,optimizer
    model,optimizer = run(0)
    again,other = run(1, start=2)
    assert not changed(snapshot(model, optimizer), snapshot(again, other))

# ------------------------------------------------------------ imports
def python(code): return subprocess.run([sys.executable, '-W', 'ignore', '-c', f'import sys; sys.path.insert(0, {str(HERE)!r})\n{code}'], capture_output=True, text=True)

def test_trainers_are_imported_when_asked_for():
    done = python("import sparsefast.core, sparsefast.all, sparsefast.loops.base, sparsefast.ship.hub\nassert not {'transformers', 'lightning', 'accelerate', 'huggingface_hub', 'peft', 'timm'} & set(sys.modules)")
    assert done.returncode==0, done.stderr

@pytest.mark.parametrize('room,missing', [('hf', 'transformers'), ('hf', 'accelerate'), ('lightning', 'lightning')])
def test_without_the_trainer(room, missing):
    done = python(f"sys.modules[{missing!r}] = None\nimport sparsefast.loops.{room}")
    assert f"ImportError: sparsefast.loops.{room} needs" in done.stderr and f"pip install 'sparsefast[{room}]'" in done.stderr

# ------------------------------------------------------------ `attach` after the state was loaded
@pytest.mark.parametrize('step', [None, 3])
def test_attached_to_an_optimizer_that_has_loaded_its_state(step):
    model = sparse_mlp()
    opt = TORCH_OPTS['adamw'](model.parameters())
    attached = attach(method_of(), model, opt, 40)
    for x,y in batches(40)[:20]: backward(model, x, y); opt.step()
    states = copy.deepcopy((model.state_dict(), opt.state_dict()))
    for x,y in batches(40)[20:]: backward(model, x, y); opt.step()
    twin = sparse_mlp(seed=5)
    other = TORCH_OPTS['adamw'](twin.parameters())
    twin.load_state_dict(states[0]); other.load_state_dict(states[1])
    resumed = attach(method_of(), twin, other, 40, step=step)
    assert resumed.step==(step or 20) and 'sparsefast_step' not in other.param_groups[0]
    if step: return
    for x,y in batches(40)[20:]: backward(twin, x, y); other.step()
    assert resumed.step==40 and not changed(snapshot(model, opt), snapshot(twin, other))
