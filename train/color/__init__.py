"""MLM adaptation for color on any PLM, CLIP and bank: splits, controls, ablations, published test sets."""
