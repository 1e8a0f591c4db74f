from fisher_ray.estimators import Exact, Sampled
from fisher_ray.scores import Scores, iter_scores, score_factors
from fisher_ray.split import ModelError, SelfCheck, SplitModel
