"""MLM adaptation for colour on any PLM, CLIP and bank: splits, controls, ablations, published test sets."""
