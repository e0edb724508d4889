"""Which models can be made sparse: architectures of torchvision, timm and Hugging Face, by name and without weights.

    python benchmarks/zoo.py            # tries what zoo.jsonl lacks, then prints the table; some half hour on one core
    python benchmarks/zoo.py --table    # only prints it
    python benchmarks/zoo.py --only 'timm (vit|resnet)'

Each model is made sparse at 90 % by each distribution; a forward, a backward and one update of RigL on random inputs follow; then sparsity is removed. A model passes if each layer has exactly the weights that it should
before and after the update, masked weights are zero, those written from outside do not reach the output, no weight of a layer has been overlooked, and no trace of masks is left in the end. Of torchvision all classifiers are tried, of timm the smallest of each family, of Hugging Face a few small
configurations; those of more than 100 million weights are left out."""
import math, warnings
import torch
from torch import nn
from sparsefast.all import *
from sparsefast.masks import masked_params, n_active
from records import Records, parser

records,limit = Records(__file__),100e6
dists = dict(uniform=uniform_sparsity, first_dense=first_layer_dense_uniform, erk=erdos_renyi_sparsity)

# ------------------------------------------------------------ the models: name -> (a function that makes one, a function that runs it)
def first_tensor(o):
    "The first tensor of numbers in what a model returns"
    if torch.is_tensor(o): return o if o.is_floating_point() else None
    for v in (o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()):
        if (t := first_tensor(v)) is not None: return t

def run_images(size): return lambda model: first_tensor(model(torch.randn(2, *size)))

def vision_models():
    import torchvision
    sizes = dict(inception_v3=299)
    for n in torchvision.models.list_models(module=torchvision.models):
        kw = dict(aux_logits=False, init_weights=False) if n in ('googlenet', 'inception_v3') else {}
        yield f'torchvision {n}', lambda n=n, kw=kw: torchvision.models.get_model(n, weights=None, **kw), run_images((3, *[sizes.get(n, 224)]*2))

small = 'atto femto pico nano micro tiny xxs xxxs mini small _s 18 lite 0 b0'.split()
def timm_models():
    import timm
    for family in timm.list_modules():
        names = [n for n in timm.list_models(module=family) if 'in21' not in n]
        names = sorted(names, key=lambda n: (min([i for i,w in enumerate(small) if w in n], default=99), len(n)))[:6]
        if names: yield f'timm {family}', lambda names=names: smallest(names), None

def smallest(names):
    "The one with the fewest weights, and how it is run"
    import timm
    def size(n):
        with torch.device('meta'): return sum(p.numel() for p in timm.create_model(n).parameters())
    sizes = {}
    for n in names:
        try: sizes[n] = size(n)
        except Exception: sizes[n] = math.inf                                # some cannot be made without memory: tried only if all are so
    model = timm.create_model(best := min(sizes, key=sizes.get))
    model.zoo_name,model.zoo_run = best,run_images(model.default_cfg['input_size'])
    return model

def language_models():
    import transformers as t
    tiny = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
    def words(model):
        ids = torch.randint(90, (2, 12))
        return first_tensor(dict(model(input_ids=ids, **(dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}))))
    makes = dict(BertForSequenceClassification=lambda: t.BertConfig(**tiny), DistilBertForSequenceClassification=lambda: t.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
                 GPT2LMHeadModel=lambda: t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64), LlamaForCausalLM=lambda: t.LlamaConfig(**tiny, num_key_value_heads=2),
                 MistralForCausalLM=lambda: t.MistralConfig(**tiny, num_key_value_heads=2), OPTForCausalLM=lambda: t.OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
                 T5ForConditionalGeneration=lambda: t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), Qwen2ForCausalLM=lambda: t.Qwen2Config(**tiny, num_key_value_heads=2),
                 MixtralForCausalLM=lambda: t.MixtralConfig(**tiny, num_key_value_heads=2, num_local_experts=4))
    for n,config in makes.items(): yield f'transformers {n}', lambda n=n, config=config: getattr(t, n)(config()), words
    vit = lambda: t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
    yield 'transformers ViTForImageClassification', lambda: t.ViTForImageClassification(vit()), run_images((3, 32, 32))

# ------------------------------------------------------------ one model
def overlooked(model):
    "Weights with two dimensions of more than one that belong to a linear layer, a convolution, attention or a recurrent layer, and are not known as such"
    known = {id(w.p) for w in weight_names(model)}
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
    return [f'{n}.{k}' for n,m in model.named_modules() if isinstance(m, kinds) for k,p in m._parameters.items() if p is not None and p.dim()>1 and p.numel()>max(p.shape) and k not in ('bias_k', 'bias_v') and id(p) not in known]

def others(model):
    "Share of the weights of two dimensions or more that are in no layer we know, embeddings aside: tables of positions, experts in one tensor"
    known = {id(w.p) for w in weight_names(model)} | {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = [(p.numel(), id(p) in known) for p in model.parameters() if p.dim()>1]
    return round(sum(n for n,k in sizes if not k)/sum(n for n,_ in sizes), 4)

def check(model):
    "Counts and zeros"
    for p,mask,s in sparse_params(model):
        assert abs(int(mask.sum())-n_active(p.numel(), s))<=p.numel()//2**24, 'a layer has another number of weights than it should'    # the precision of the stored target
        assert not p[~mask].any(), 'a masked weight is not zero'

def enforced(model, run):
    "Masked weights written from outside must not reach the output, however a model uses its layers"
    def out():
        torch.manual_seed(1)
        with torch.no_grad(): return run(model.eval())
    clean = out()
    for p,mask,_ in sparse_params(model): p.data[~mask] = 1.
    assert torch.allclose(clean, out(), rtol=1e-4, atol=1e-5, equal_nan=True), 'a masked weight that was written from outside is used'

def attempt(model, run, dist):
    "Sparse, forward, backward, update, dense again"
    before,keys = sum(p.numel() for p in model.parameters()),list(model.state_dict())
    sparsify_model(model, 0.9, sparse_f=dists[dist])
    check(model)
    opt,method = torch.optim.SGD(model.parameters(), lr=1e-3), DSTMethod(**{**SET_presets, 'grow_score_f': gradient_magnitude, 'batches_per_update': 1})
    first = [mask.clone() for _,mask,_ in sparse_params(model)]
    run(model.train()).float().square().mean().backward()
    method.step(model, opt, 1, 0.)
    check(model)
    used = [p.grad is not None for p,*_ in sparse_params(model)]
    moved = [not torch.equal(a, mask) for a,(_,mask,_) in zip(first, sparse_params(model))]
    enforced(model, run)
    unsparsify_model(model)
    assert keys==list(model.state_dict()) and before==sum(p.numel() for p in model.parameters()), 'a trace of masks is left'
    model.zero_grad(set_to_none=True)
    return dict(layers=len(first), unused=used.count(False), moved=sum(moved))

def record(name, make, run):
    torch.manual_seed(0)
    model = make()
    run = run or model.zoo_run
    rec = dict(name=name, model=getattr(model, 'zoo_name', name.split()[-1]), parameters=sum(p.numel() for p in model.parameters()))
    if rec['parameters']>limit: return {**rec, 'result': 'too large'}
    try: run(model.train())
    except Exception as e: return {**rec, 'result': f'does not run when dense: {type(e).__name__}: {str(e)[:120]}'}
    rec |= dict(overlooked=overlooked(model), others=others(model))
    for dist in dists:
        try: rec[dist] = attempt(model, run, dist)
        except Exception as e: return {**rec, 'result': f'{dist}: {type(e).__name__}: {str(e)[:200]}'}
    return {**rec, 'result': 'passes' if not rec['overlooked'] else f"overlooks {rec['overlooked'][0]}"}

# ------------------------------------------------------------ all
done = records.done

def table():
    "How many pass, and what is to be said of the others, as Markdown"
    runs = list(done().values())
    rows = ['| zoo | tried | pass | too large | fail |', '|---|---:|---:|---:|---:|']
    for zoo in dict.fromkeys(r['name'].split()[0] for r in runs):
        mine = [r['result'] for r in runs if r['name'].startswith(zoo)]
        rows.append(f"| {zoo} | {len(mine)} | {mine.count('passes')} | {mine.count('too large')} | {sum(r not in ('passes', 'too large') for r in mine)} |")
    rows += ['', '| model | what |', '|---|---|', *[f"| {r['name']}{'' if r['model'] in r['name'] else ': '+r['model']} | {r['result']} |" for r in runs if r['result'] not in ('passes', 'too large')]]
    return '\n'.join(rows)

def main():
    args = parser(__doc__, 'models').parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    every = (m for models in (language_models, vision_models, timm_models) for m in models())
    for name,make,run in [] if args.table else records.lacking(every, lambda name, *_: name, args.only):
        try: rec = record(name, make, run)
        except Exception as e: rec = dict(name=name, model='', parameters=0, result=f'cannot be made: {type(e).__name__}: {str(e)[:120]}')
        records.add({**rec, 'torch': torch.__version__})
        print(name, rec['model'], rec['result'], flush=True)
    print(table())

if __name__=='__main__': main()
