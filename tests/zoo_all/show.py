import json,sys
for l in open(sys.argv[1]):
    r=json.loads(l)
    p=r.get("products",{})
    f=lambda v: f"{v:.0e}" if isinstance(v,float) else str(v)[:60]
    print(f"{r['type'][:24]:24s} {r['status']:8s} fold {p.get('folded',0):3d} onl {p.get('online',0):3d} decl {p.get('declined',0):3d} err {f(r.get('max_error'))} own {f(r.get('own_error'))} oth {f(r.get('other_error'))} {r.get('time','')}s {r.get('detail','')[:160]} {r.get('where','')}{' UNDONE '+str(r['undone'][:2]) if r.get('undone') else ''}{' ATTN '+r['attn'] if 'attn' in r else ''}")
