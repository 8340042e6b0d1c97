"""The methods that the paper compares with prefix-tuning, and the evaluation of any method. May
import training and whatever training may import."""
