"""The factory of the tiny model: nobody needs it who trains with it, samples or judges.

scenes.py    what can be drawn, and how: icons, cues, grounds
pictures.py  what the networks see: compositions, scenes, spoiled nouns, latents
samplers.py  which caption comes with which picture
training.py  Muon, the learning rate, the running mean of the weights
bars.py      what the model is held to
__main__.py  the four networks and their losses; the command
"""
