import subprocess, sys, json, os
from transformers.models.auto import modeling_auto as ma
kind=sys.argv[1]; outp=sys.argv[2]; only=sys.argv[3:] 
MAPS={"causal":"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES","masked":"MODEL_FOR_MASKED_LM_MAPPING_NAMES","seq2seq":"MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES","image":"MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES","base":"MODEL_MAPPING_NAMES"}
names=list(getattr(ma,MAPS[kind]))
if only: names=[n for n in only if n in names]
with open(outp,"w") as f:
    for n in names:
        try:
            r=subprocess.run(["flock","-s","PLACE.lock","nice","-n","5","timeout","100",".venv/bin/python","PLACE.py",kind,n],capture_output=True,text=True,timeout=3000,env={**os.environ,"OMP_NUM_THREADS":"1"})
            line=[l for l in r.stdout.splitlines() if l.startswith("@@")]
            rec=line[-1][2:] if line else json.dumps({"type":n,"kind":kind,"status":"DIED" if r.returncode!=124 else "TIMEOUT","detail":(r.stderr or "")[-300:]})
        except subprocess.TimeoutExpired:
            rec=json.dumps({"type":n,"kind":kind,"status":"TIMEOUT"})
        f.write(rec+"\n"); f.flush()
