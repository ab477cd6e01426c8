"""The recipe of the built-in checkpoint: ``python -m train.demo``.

Named emoji pictures train a tiny CLIP, facts about their names train a tiny BERT that never reads which
object has which color, and X-adapter plug-ins then let the BERT see the colors. ``recipe.toml`` holds
every setting.
"""
