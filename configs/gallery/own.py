"""A reward function as verl's users have it: it reads the whole response and finds the answer itself."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.rpartition("so: ")[2].strip() == ground_truth)
