"""build/ae.safetensors of ae_train.py -> the format of tiny/training.py: python convert_ae.py FROM TO STEPS"""
import sys; sys.path.insert(0, "."); sys.path.insert(0, "./repo")
from trainer import load_state
from run_folder import write_safetensors
t, h = load_state(sys.argv[1])
write_safetensors(__import__("pathlib").Path(sys.argv[2]), t, {"steps": int(sys.argv[3]) if len(sys.argv) > 3 else h["steps"], "seconds": h["seconds"]})
print(h)
