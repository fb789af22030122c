"""Rotate one tiny random model of a transformers model type and say what happened (JSON line)."""
import sys, json, time, copy, traceback, warnings, logging, os
warnings.filterwarnings("ignore"); os.environ["TRANSFORMERS_VERBOSITY"]="error"
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(1)
import transformers as hf
hf.logging.set_verbosity_error()
from transformers import AutoConfig
from transformers.models.auto import modeling_auto as ma
from tests.zoo import randomise
kind, mtype = sys.argv[1], sys.argv[2]
attn = sys.argv[3] if len(sys.argv)>3 else "sdpa"
V=64
OV=dict(vocab_size=V, hidden_size=48, n_embd=48, d_model=48, dim=48, embed_dim=48, n_embed=48, width=48, hidden_dim=80,
 num_hidden_layers=2, n_layer=2, n_layers=2, num_layers=2, encoder_layers=2, decoder_layers=2, num_decoder_layers=2, num_encoder_layers=2,
 num_attention_heads=6, n_head=6, n_heads=6, num_heads=6, encoder_attention_heads=6, decoder_attention_heads=6,
 num_key_value_heads=2, num_kv_heads=2, multi_query_group_num=2,
 intermediate_size=80, ffn_dim=80, d_ff=80, n_inner=80, encoder_ffn_dim=80, decoder_ffn_dim=80, ffn_hidden_size=80, dim_ff=80,
 shared_expert_intermediate_size=40, moe_intermediate_size=40, n_positions=32, max_position_embeddings=32, seq_length=32, n_ctx=32, max_seq_len=32,
 max_sequence_length=32, max_target_positions=32, max_source_positions=32, max_length=None,
 num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2, top_k_experts=2,
 n_group=1, topk_group=1, num_expert_group=1,
 head_dim=8, d_kv=8, kv_channels=8, q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
 attention_head_dim=8, embedding_size=48, word_embed_proj_dim=48, type_vocab_size=2,
 pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, sliding_window=4, attention_window=4,
 dropout=0.0, attention_dropout=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
 use_cache=False, image_size=16, patch_size=4, num_channels=3, state_size=8, mamba_d_state=8, mamba_n_heads=6, mamba_d_head=16, mamba_n_groups=2, ssm_state_size=8, time_step_rank=8, conv_kernel=4,
 mamba_num_heads=6, mamba_head_dim=16, n_groups=2, chunk_size=4, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, expand=2,
 vocab_size_per_layer_input=V, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=8, lru_width=48, attention_window_size=4,
 global_rope_theta=1e4, rotary_dim=4, adapter_rank=8, mlp_dim=80, max_window_layers=1, moe_layer_freq=1, first_k_dense_replace=1, tie_word_embeddings=None,
 hidden_sizes=[24,48], depths=[1,1], num_query_heads=6,
)
SPECIAL={
 "xlnet":{"d_head":8},"xlm":{"emb_dim":48},"gpt_neo":{"attention_types":[[["global","local"],1]],"window_size":4},
 "deepseek_v3":{"n_group":2,"topk_group":1},
 "gptj":{"rotary_dim":4},"codegen":{"rotary_dim":4,"n_head":4},
 "reformer":{"attn_layers":["local","local"],"axial_pos_embds":False},
 "mpt":{"max_seq_len":32},"bamba":{"attn_layer_indices":[1]},
 "qwen2_vl":{}, "opt":{"word_embed_proj_dim":48},
 "phi":{"num_key_value_heads":6},
 "recurrent_gemma":{"num_key_value_heads":2},
 "cpmant":{}, "electra":{"embedding_size":24},
 "xglm":{"attention_heads":6},"biogpt":{}, "ctrl":{"dff":80},
 "openai-gpt":{}, "minimax":{"block_size":4,"layer_types":["full_attention","linear_attention"]},
 "jetmoe":{"num_key_value_heads":3,"num_attention_heads":6}, "bloom":{"num_key_value_heads":None},
 "persimmon":{"num_key_value_heads":6},"stablelm":{"num_key_value_heads":2},
}
def shrink(cfgcls, mtype, tweak={}):
    d=cfgcls()
    have=set(d.to_dict())|set(getattr(cfgcls,"attribute_map",{}))
    kw={k:v for k,v in OV.items() if k in have}
    for k in list(kw):
        if kw[k] is None: del kw[k]
        elif k in d.to_dict() and d.to_dict()[k] is None and k in ("head_dim","q_lora_rank","sliding_window","n_inner","rotary_dim","d_kv","num_key_value_heads","pad_token_id"): 
            if k not in ("pad_token_id",): del kw[k]
    if "layer_types" in have or getattr(d,"layer_types",None):
        lt=list(dict.fromkeys(getattr(d,"layer_types",None) or []))
        if lt:
            lt=(lt*2)[:max(2,len(lt))]; kw["layer_types"]=lt
            for k in ("num_hidden_layers",): kw[k]=len(lt)
    kw.update(SPECIAL.get(mtype,{}))
    for k,v in tweak.items():
        if v=='DROP': kw.pop(k,None)
        elif k in have: kw[k]=v
    cfg=None
    for _ in range(6):
        try: cfg=cfgcls(**kw); break
        except AttributeError as e:
            import re as _re
            m_=_re.search(r"property '(\w+)' of",str(e))
            if not m_: raise
            kw.pop(m_.group(1),None)
    cfg=cfgcls(**kw)
    for name in getattr(cfgcls,"sub_configs",{}) or {}:
        sub=getattr(cfg,name,None)
        if sub is not None:
            kw[name]=shrink(type(sub), mtype+"."+name, tweak)
    if getattr(cfgcls,"sub_configs",None): 
        cfg=cfgcls(**kw)
    return cfg
res={"kind":kind,"type":mtype}
def done(**k):
    res.update(k); print("@@"+json.dumps(res)); sys.exit(0)
MAPS={"causal":"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES","masked":"MODEL_FOR_MASKED_LM_MAPPING_NAMES","seq2seq":"MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES","image":"MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES","base":"MODEL_MAPPING_NAMES"}
try:
    name=getattr(ma,MAPS[kind])[mtype]
    if isinstance(name,(tuple,list)): name=name[0]
    cls=getattr(hf,name)
    g=torch.Generator().manual_seed(0)
    ids=lambda b,t: torch.randint(3,V,(b,t),generator=g)
    def make(b,t,dt=torch.float64):
        if kind in("causal","masked","base"): return {"input_ids":ids(b,t)}
        if kind=="seq2seq": return {"input_ids":ids(b,t),"decoder_input_ids":ids(b,t-2)}
        return {"pixel_values":torch.randn(b,3,16,16,generator=g).to(dt)}
    def out(m,x):
        with torch.no_grad():
            kw={"use_cache":False} if kind in("causal","seq2seq") else {}
            try: r=m(**x,**kw)
            except TypeError: r=m(**x)
        return r[0] if not isinstance(r,torch.Tensor) else r
    tweaks=[{}, {"num_key_value_heads":6}, {"head_dim":8}, {"num_key_value_heads":6,"head_dim":8},{"layer_types":"DROP"},{"layer_types":"DROP","num_key_value_heads":6},{"sliding_window":"DROP"},{"num_key_value_heads":6,"first_k_dense_replace":"DROP","qk_rope_head_dim":8},{"hidden_size_per_layer_input":0},{"num_attention_heads":4,"n_head":4,"num_heads":4,"num_key_value_heads":4,"head_dim":"DROP"},
      {"intermediate_size":96,"moe_intermediate_size":48}, {"hidden_size":64,"num_attention_heads":8,"num_key_value_heads":4,"intermediate_size":128,"moe_intermediate_size":64}]
    errs=[]
    model=None
    for tw in tweaks:
      for at in ("sdpa","eager"):
        for dt in (torch.float64,torch.float32):
          try:
            cfg=shrink(cls.config_class, mtype, tw)
            torch.manual_seed(0)
            cfg._attn_implementation=at
            model=cls._from_config(cfg)
            n=sum(p.numel() for p in model.parameters())
            if n>3e7: done(status="TOO BIG",detail=str(n))
            model=model.double(); randomise(model,0); model=model.eval().to(dt)
            x,y=make(2,7,dt),make(3,9,dt)
            want,want2=out(model,x),out(model,y)
            res["setup"]=[str(tw),at,str(dt)]
            break
          except Exception as e:
            errs.append(f"{type(e).__name__}: {str(e)[:120]}"); model=None
        if model is not None: break
      if model is not None: break
    if model is None: done(status="SETUP",detail=" | ".join(dict.fromkeys(errs))[:400])
    if not want.isfinite().all(): res["nonfinite"]=True
except Exception as e:
    done(status="SETUP",detail=f"{type(e).__name__}: {str(e)[:300]}")
TOL=2e-5 if want.dtype==torch.float64 else 1e-3
import qpass
from qpass.errors import QpassError
t=time.time()
try:
    m=copy.deepcopy(model)
    ins=qpass.inspect(m,x)
    import collections
    res["products"]=dict(collections.Counter(p.input for p in ins.products))
    res["declined"]=dict(collections.Counter(p.why.split(" (")[0][:110] for p in ins.products if p.input=="declined"))
    res["onlines"]=[p.site for p in ins.products if p.input=="online"][:14]
    res["free"]=[f"{r.name} {r.heads}x{r.width}" for r in ins.regions if r.free]
    import re
    emb=[r for r in ins.regions if r.width==48]
    res["w48"]=[f"{r.name}: "+("FREE" if r.free else "; ".join(dict.fromkeys(f"{p.why}@{p.where}" for p in r.pins[:4]))) for r in emb][:8]
    res["notes"]=[f"{n.where}: {n.why}" for n in ins.notes if not n.done][:10]
    from qpass.capture import capture; from qpass.transform import FoldNorms; from qpass.ir import run_passes
    rep=qpass.rotate(m,x)
    fl=ins.regions; changed={(s.use,s.axis) for r in fl if r.name in {q.region for q in rep.plan.rotated} for s in r.sites}
    res["w3"]=sum(1 for u,a in changed if len(u) and 0==0 and any(t in u for t in ("expert",)))
    res["max_error"],res["eager_error"]=rep.max_error,rep.eager_error
    res["undone"]=[f"{d.where}: {d.why}" for d in rep.plan.declined if "undone" in d.why][:5]
    res["rnotes"]=[f"{n.where}: {n.why}" for n in rep.notes if not n.done and f"{n.where}: {n.why}" not in res["notes"]][:5]
    got=out(m,x); sc=float(want.abs().max()); res["own_error"]=float((got-want).abs().max())/sc
    try: got2=out(m,y); res["other_error"]=float((got2-want2).abs().max())/float(want2.abs().max())
    except Exception as e: res["other_error"]=f"{type(e).__name__}: {str(e)[:150]}"
    bad= not (res["max_error"]<=1e-9) or not (res["own_error"]<=TOL) or not (isinstance(res["other_error"],float) and res["other_error"]<=TOL)
    done(status="BAD" if bad else "OK",time=round(time.time()-t,1))
except QpassError as e:
    done(status="REFUSED",detail=f"{type(e).__name__}: {str(e)[:400]}",time=round(time.time()-t,1))
except Exception as e:
    tb=traceback.extract_tb(e.__traceback__)
    where=[f"{os.path.basename(f.filename)}:{f.lineno}:{f.name}" for f in tb if "/qpass/" in f.filename][-3:]
    done(status="CRASH",detail=f"{type(e).__name__}: {str(e)[:400]}",where=where,time=round(time.time()-t,1))
